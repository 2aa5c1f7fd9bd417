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
from datasets import Dataset
from examples import build
from pyarrow import parquet
from stand_ins import WIDTH, WORDS, tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.cli import app
from hf_hardattn.inference import collection
from hf_hardattn.inference.predictor import Predictor
from hf_hardattn.inspection.model_with_processor import ModelWithProcessor
from hf_hardattn.inspection.perturbation import PerturbationEvaluator

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


READERS = [
    ("bert", "BertForSequenceClassification", "text"),
    ("distilbert", "DistilBertForSequenceClassification", "text"),
    ("modernbert", "ModernBertForSequenceClassification", "text"),
    ("t5", "T5ForConditionalGeneration", "encoder"),
    ("bart", "BartForConditionalGeneration", "encoder"),
    ("llama", "LlamaForCausalLM", "decoder"),
    ("llama", "LlamaForSequenceClassification", "decoder"),
    ("qwen3", "Qwen3ForCausalLM", "decoder"),
    ("gemma", "GemmaForCausalLM", "decoder"),
]


@pytest.mark.parametrize("kind", ["inputs", "tokens.1"])
@pytest.mark.parametrize(("family", "head", "tower"), READERS)
def test_what_is_kept_of_a_row_does_not_depend_on_the_batch(family, head, tower, kind):
    """Whichever side the rows of a batch are padded on, the places are those of the row alone."""
    torch.manual_seed(0)
    groups = {"num_key_value_heads": 3} if tower == "decoder" else {}
    model = build(family, head, **groups).model.eval()
    hf_hardattn.apply(model, {"sites": {f"{tower}.{kind}": {"budget": 0.5}}})
    predictor = Predictor(ModelWithProcessor(model, tokenizer("[CLS]", "[SEP]"), "x"), max_new_tokens=2)
    texts = ["a dog runs", "the red green dog sleeps on the long grass", "cat", "all is well report says that"]
    together, alone = predictor(texts), [predictor([text]) for text in texts]
    assert together["kept"] == [found["kept"][0] for found in alone]
    assert together["kept_share"] == pytest.approx([found["kept_share"][0] for found in alone])


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (3, None),
        (3, "single_label_classification"),
        (3, "multi_label_classification"),
        (1, None),
        (1, "regression"),
        (1, "multi_label_classification"),
    ],
)
def test_a_label_has_the_score_that_the_pipeline_gives_it(labels, task):
    torch.manual_seed(0)
    config = BertConfig(**WIDTH, vocab_size=40, num_hidden_layers=1, num_labels=labels, problem_type=task)
    model = BertForSequenceClassification(config).eval()
    read, texts = tokenizer("[CLS]", "[SEP]"), sentences(4)
    found = Predictor(ModelWithProcessor(model, read, "x"))(texts)
    expected = pipeline("text-classification", model=model, tokenizer=read)(texts)
    assert found["label"] == [row["label"] for row in expected]
    assert found["score"] == pytest.approx([row["score"] for row in expected], abs=1e-5)
    evaluated = ModelWithProcessor(model, read, "x")
    batch = evaluated.encode(texts)
    if task == "regression":
        for ask in (
            lambda: PerturbationEvaluator(model, batch),
            lambda: evaluated.predict(evaluated.encode(texts[:1])),
        ):
            with pytest.raises(HardAttentionError, match="predicts a number .* which has no probability"):
                ask()
        return
    assert PerturbationEvaluator(model, batch).full.tolist() == pytest.approx(found["score"], abs=1e-5)
    assert evaluated.predict(evaluated.encode(texts[:1])).probability == pytest.approx(found["score"][0], abs=1e-5)


def interrupted(tmp_path, data, monkeypatch):
    """Start a run that ends behind its first chunk."""
    write, seen = collection._write, []

    def fail_at_second(path, table):
        if seen:
            raise KeyboardInterrupt
        seen.append(path)
        write(path, table)

    with monkeypatch.context() as patch:
        patch.setattr(collection, "_write", fail_at_second)
        assert predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "20").exit_code != 0


@pytest.mark.parametrize("what", ["data_state", "weights", "selector", "config", "rows"])
def test_a_run_does_not_go_on_with_other_data_or_another_model(tmp_path, data, monkeypatch, what):
    """Under the same names: a file written again, a model trained on, a budget changed."""
    model = checkpoint(tmp_path / "model")
    interrupted(tmp_path, data, monkeypatch)
    if what in ("data_state", "rows"):
        lines = data.read_text().splitlines()
        data.write_text("\n".join(lines[:1] + lines[:0:-1] + ["a dog"] * (what == "rows")) + "\n")
    elif what == "config":
        hf_hardattn.set_budget(model, 0.9)
    else:
        with torch.no_grad():
            (model.classifier if what == "weights" else hf_hardattn.selectors(model)["text.tokens.0"].scorer).apply(
                lambda part: [weight.mul_(-1) for weight in part.parameters(recurse=False)]
            )
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(HardAttentionError, match=f"of another run: .*{'weights' if what == 'selector' else what} was"):
        predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "20")


def test_one_run_at_a_time_writes_an_output(tmp_path, data, monkeypatch):
    """A second one is refused at once, and the first one ends as if it had been alone."""
    checkpoint(tmp_path / "model")
    predict(tmp_path / "model", data, tmp_path / "whole.parquet", "--chunk", "20")
    write = collection._write

    def try_again(path, table):
        with pytest.raises(HardAttentionError, match="is being written by another run"):
            predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "20")
        write(path, table)

    monkeypatch.setattr(collection, "_write", try_again)
    assert predict(tmp_path / "model", data, tmp_path / "out.parquet", "--chunk", "20").exit_code == 0
    assert contents(tmp_path / "out.parquet").equals(contents(tmp_path / "whole.parquet"))
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.parquet"]


@pytest.mark.parametrize(
    ("value", "why"),
    [("", "is an empty text"), ("  ", "is an empty text"), (None, "is None; model reads a text"), (3, "is 3")],
)
def test_a_row_without_a_text_is_named_before_anything_is_predicted(tmp_path, monkeypatch, value, why):
    checkpoint(tmp_path / "model")
    rows = Dataset.from_dict({"text": [3] * 8 if value == 3 else ["a dog"] * 7 + [value]})
    predictor = Predictor(ModelWithProcessor.load(str(tmp_path / "model")))
    monkeypatch.setattr(Predictor, "__call__", lambda *_: pytest.fail("a row was predicted"))
    row = 0 if value == 3 else 7
    with pytest.raises(HardAttentionError, match=rf"row {row} \(the first is 0\) {why}"):
        collection.predict_collection(predictor, rows, "text", tmp_path / "out.parquet", run={}, chunk=2)
    assert not (tmp_path / "out.parquet.parts").exists()  # so that the corrected data can be predicted at once


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
