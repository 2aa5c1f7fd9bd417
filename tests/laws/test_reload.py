"""Law 6: save, then reload in a fresh process: hard, with the same logits and selections; stock models stay stock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cases import HEADS, Example, all_sites, cases, close, harden, run, stock
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSeq2SeqLM

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError

CASES = cases(("linear", "mlp", "query_key"), ("simple", "reinforce"), (3, 0.5, "top_p:0.6"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Every case saved here, loaded and run there; one process for all, since starting one is slow."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for architecture, head in HEADS:
        if hasattr(transformers, head):
            save(stock(architecture, head), folder / f"stock-{head}")
    for number, case in enumerate(CASES):
        example = stock(case.place.architecture, case.head)
        harden(example.model, case.config())
        save(example, folder / f"hard-{case.head}-{number}")
    command = [sys.executable, str(Path(__file__).with_name("fresh_process.py")), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(folder / "answers.pt")


def save(example, path):
    example.model.save_pretrained(path)
    torch.save(example.batch, path / "batch.pt")


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_fresh_process_loads_it_hard(answers, number):
    case = CASES[number]
    example = stock(case.place.architecture, case.head)
    harden(example.model, case.config())
    with hf_hardattn.record(example.model) as selections:
        expected = run(example)
    found, masks = answers[f"hard-{case.head}-{number}"]
    close(found, expected)
    assert [site for site, _ in masks] == [s.site for s in selections]
    assert all(torch.equal(mask, s.mask) for (_, mask), s in zip(masks, selections, strict=True))


@pytest.fixture
def nan_in_fresh_memory():
    """What nobody initialises is NaN, and not by luck the zeros of a new page."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_every_way_in_is_hard(architecture, head, tmp_path):
    example = stock(architecture, head)
    cls, config = type(example.model), HardAttentionConfig(sites=["*"], budget=3, scorer="linear")
    example.model.save_pretrained(tmp_path)
    sites = set(all_sites(example.model))
    for given in (config, config.to_dict()):
        model, info = cls.from_pretrained(tmp_path, hard_attention=given, output_loading_info=True)
        assert set(hf_hardattn.selectors(model)) == sites and all("selector" in key for key in info["missing_keys"])
        assert model.config.hard_attention == config.to_dict()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        reference = stock(architecture, head)
        harden(reference.model, config)
        harden(model, config)
        close(run(Example(model.eval(), example.batch)), run(reference))
    fresh = type(example.model.config).from_pretrained(tmp_path, hard_attention=config)
    assert set(hf_hardattn.selectors(cls(fresh))) == set(hf_hardattn.selectors(cls._from_config(fresh))) == sites
    harden(example.model, config)
    example.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hard_attention"] == config.to_dict()
    close(run(Example(cls.from_pretrained(tmp_path).eval(), example.batch)), run(example))
    soft = cls.from_pretrained(tmp_path, hard_attention=None)
    assert not hf_hardattn.selectors(soft) and type(soft.get_submodule("")) is cls
    close(run(Example(soft.eval(), example.batch)), run(stock(architecture, head)))


@pytest.mark.parametrize(
    ("auto", "architecture", "head", "pattern"),
    [
        (AutoModelForImageClassification, "vit", "ViTForImageClassification", "vision.inputs"),
        (AutoModel, "vit", "ViTModel", "vision.tokens.*"),
        (AutoModelForSeq2SeqLM, "t5", "T5ForConditionalGeneration", "decoder.cross.*"),
    ],
)
def test_the_auto_classes_take_the_keyword(auto, architecture, head, pattern, tmp_path):
    example = stock(architecture, head)
    example.model.save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path, hard_attention={"sites": [pattern]})
    assert type(model) is type(example.model) and all(
        s.startswith(pattern.rstrip("*")) for s in hf_hardattn.selectors(model)
    )
    assert hf_hardattn.selectors(auto.from_config(model.config))
    assert not hf_hardattn.selectors(auto.from_pretrained(tmp_path))


def hard_checkpoint(path, **changes):
    example = stock("vit", "ViTForImageClassification")
    harden(example.model, {"sites": ["vision.tokens.*"], "budget": 0.5})
    example.model.save_pretrained(path)
    data = json.loads((path / "config.json").read_text())
    data["hard_attention"].update(changes)
    (path / "config.json").write_text(json.dumps(data))
    return type(example.model)


def test_a_checkpoint_without_its_selectors_is_refused(tmp_path):
    cls = hard_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "selector" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        HardAttentionError, match=r"its weights lack 6 selector tensors \(first: .*hard_attention=None to load it soft"
    ):
        cls.from_pretrained(tmp_path)
    assert hf_hardattn.selectors(cls.from_pretrained(tmp_path, hard_attention={"sites": ["vision.tokens.*"]}))
    assert not hf_hardattn.selectors(cls.from_pretrained(tmp_path, hard_attention=None))


def test_selectors_without_a_configuration_are_announced(tmp_path):
    cls = hard_checkpoint(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    del data["hard_attention"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="holds 6 selector tensors .* the model runs SOFT"):
        cls.from_pretrained(tmp_path)


def test_a_newer_schema_is_refused(tmp_path):
    cls = hard_checkpoint(tmp_path, schema_version=99, from_the_future=True)
    with pytest.raises(HardAttentionError, match="schema_version=99 is newer .* pip install -U hf-hardattn"):
        cls.from_pretrained(tmp_path)


def test_a_site_that_the_model_lacks_is_refused(tmp_path):
    cls = hard_checkpoint(tmp_path, sites={"vision.tokens.7": {}})
    with pytest.raises(
        HardAttentionError,
        match="no site matches 'vision.tokens.7' in ViTForImageClassification; it has: 'vision.inputs'",
    ):
        cls.from_pretrained(tmp_path)
