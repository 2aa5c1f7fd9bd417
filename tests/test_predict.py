"""``hf-hardattn predict``: one row an input, whoever computes it, and whatever interrupts."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from pyarrow import parquet
from stand_ins import WIDTH, WORDS, tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.cli import app
from hf_hardattn.inference import collection
from hf_hardattn.inference.predictor import Predictor
from hf_hardattn.inspection.model_with_processor import ModelWithProcessor

ROOT = Path(__file__).parents[1]


def checkpoint(folder, cls=BertForSequenceClassification, hard=True):
    torch.manual_seed(0)
    model = cls(BertConfig(**WIDTH, vocab_size=40, num_hidden_layers=2, num_labels=3, initializer_range=1.0))
    if hard:
        hf_hardattn.apply(model, {"sites": {"text.tokens.0": {"budget": 0.5}}})
    model.save_pretrained(folder)
    tokenizer("[CLS]", "[SEP]").save_pretrained(folder)
    return model.eval()


def sentences(count):
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(count)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([text] for text in sentences(50))
    return path


def predict(model, data, output, *options):
    arguments = ["predict", str(model), "--data", str(data), "--column", "text", "--output", str(output), *options]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def contents(path):
    return parquet.read_table(path).drop_columns(["seconds"])


def test_every_row_is_what_the_model_says_of_it_alone(tmp_path, data):
    model = checkpoint(tmp_path / "model")
    assert predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "16").exit_code == 0
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["index"] for row in rows] == list(range(50)) and not (tmp_path / "out.parquet.parts").exists()
    read = tokenizer("[CLS]", "[SEP]")
    for row, text in zip(rows, sentences(50), strict=True):
        batch = read(text, return_tensors="pt")
        with torch.no_grad(), hf_hardattn.record(model) as selections:
            scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0].softmax(-1)
        assert row["label"] == f"LABEL_{scores.argmax()}" and abs(row["score"] - scores.max()) < 1e-5
        assert row["kept"] == selections[0].mask[0, 0, 0].nonzero().flatten().tolist()
        assert 0 < row["kept_share"] <= 1 and row["seconds"] > 0


def test_an_embedding_is_the_mean_of_the_rows_that_are_left(tmp_path, data):
    model = checkpoint(tmp_path / "model", BertModel)
    predict(tmp_path / "model", data, tmp_path / "out.parquet")
    row = parquet.read_table(tmp_path / "out.parquet").to_pylist()[7]
    batch = tokenizer("[CLS]", "[SEP]")(sentences(50)[7], return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[0]
    kept = hidden[(hidden != 0).any(-1)]
    assert len(kept) == len(row["kept"]) < len(batch["input_ids"][0])
    numpy.testing.assert_allclose(row["embedding"], kept.mean(0), atol=1e-5)


def test_a_stock_model_is_predicted_too_and_has_nothing_kept(tmp_path, data):
    checkpoint(tmp_path / "model", BertModel, hard=False)
    predict(tmp_path / "model", data, tmp_path / "out.parquet", "--pooling", "cls")
    assert parquet.read_schema(tmp_path / "out.parquet").names == ["index", "embedding", "seconds"]
    with pytest.raises(HardAttentionError, match="is an original model, which has no budget"):
        predict(tmp_path / "model", data, tmp_path / "other.parquet", "--budget", "0.5")


def test_a_model_that_writes(tmp_path, data):
    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=1))
    hf_hardattn.apply(model, {"sites": {"encoder.inputs": {"budget": 3}}}).save_pretrained(tmp_path / "model")
    tokenizer("[BOS]", "</s>").save_pretrained(tmp_path / "model")
    options = ["--max-new-tokens", "4", "--budget", "2"]
    assert predict(tmp_path / "model", data, tmp_path / "out.parquet", *options).exit_code == 0
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert all(isinstance(row["text"], str) and len(row["kept"]) <= 3 for row in rows)  # two, and </s>


def test_an_interrupted_run_goes_on_and_a_different_one_is_refused(tmp_path, data, monkeypatch):
    checkpoint(tmp_path / "model")
    predict(tmp_path / "model", data, tmp_path / "whole.parquet", "--chunk", "8")
    write, seen = collection._write, []

    def fail_at_third(path, table):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(path.name)
        write(path, table)

    monkeypatch.setattr(collection, "_write", fail_at_third)
    assert predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "8").exit_code != 0
    with pytest.raises(HardAttentionError, match="holds chunks of another run: chunk was 8, is 16"):
        predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "16")
    monkeypatch.setattr(collection, "_write", lambda path, table: (seen.append(path.name), write(path, table)))
    predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "8")
    assert len(seen) == len(set(seen)) == 7
    assert contents(tmp_path / "out.parquet").equals(contents(tmp_path / "whole.parquet"))
    with pytest.raises(HardAttentionError, match="already exists; existing files are not overwritten by default"):
        predict(tmp_path / "model", data, tmp_path / "out.parquet")


@pytest.mark.multiprocess
def test_two_processes_killed_and_started_again_write_the_same_file(tmp_path, data):
    checkpoint(tmp_path / "model")
    predict(tmp_path / "model", data, tmp_path / "whole.parquet", "--chunk", "2")
    parts = tmp_path / "out.parquet.parts"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    command += ["-m", "hf_hardattn", "predict", str(tmp_path / "model"), "--data", str(data), "--column", "text"]
    command += ["--output", str(tmp_path / "out.parquet"), "--chunk", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    process = psutil.Popen(command, env=environment)
    deadline = time.monotonic() + 240
    while not [*parts.glob("*.parquet")] and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for one in (*process.children(recursive=True), process):
        one.kill()
    process.wait()
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert contents(tmp_path / "out.parquet").equals(contents(tmp_path / "whole.parquet"))


def test_what_cannot_be_predicted(tmp_path, data):
    checkpoint(tmp_path / "model", BertModel)
    with pytest.raises(HardAttentionError, match="no column 'words' in .*texts.csv; it has: text"):
        arguments = ["predict", str(tmp_path / "model"), "--data", str(data), "--column", "words"]
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(HardAttentionError, match="Did you mean 'mean'"):
        Predictor(ModelWithProcessor.load(str(tmp_path / "model")), pooling="means")
