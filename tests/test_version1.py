"""What version 1 computed, computed again: outputs and gradients of some cases, and checkpoints it wrote.

``scripts/research/make_version1_fixtures.py`` wrote the fixtures with version 1. Within a tolerance, since no result of a matrix product is the
same bit for bit on another processor; ``scripts/research/compare_versions.py`` compares bits, of both versions on one machine.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTForImageClassification

import hf_hardattn

FIXTURES = Path(__file__).parent / "fixtures" / "version1"
CHECKPOINTS = FIXTURES / "checkpoints"
TOLERANCE = 2e-5  # of the largest entry of a tensor or of 1, whichever is larger: some hundred float32 roundings


def version_cases() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "research" / "version_cases.py"
    spec = importlib.util.spec_from_file_location("version_cases", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["version_cases"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cases = version_cases()


@functools.cache
def fixture(family: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by ``case|result``, and the names of the gradients of each case as JSON."""
    path = FIXTURES / f"{family}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


def assert_as_before(found: Tensor, expected: Tensor, what: str) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.is_floating_point() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale, msg=lambda text: f"{what}: {text}")


def test_every_fixture_belongs_to_a_case() -> None:
    known = {case.name for case in cases.fixture_cases()}
    kept = {key.rpartition("|")[0] for family in cases.families() for key in fixture(family)[0]}
    assert kept == known and len(known) >= 20


@pytest.mark.parametrize("case", cases.fixture_cases(), ids=lambda case: case.name)
def test_case_gives_what_version_1_gave(case: Any) -> None:
    tensors, names = fixture(case.family)
    expected = {key.rpartition("|")[2]: value for key, value in tensors.items() if key.startswith(f"{case.name}|")}
    found, gradients = cases.summarise(cases.run_case(case))
    assert found.keys() == expected.keys()
    rows, rows_before = (
        dict(zip(listed, results.pop("gradients", ()), strict=True))
        for listed, results in ((gradients, found), (json.loads(names.get(case.name, "[]")), expected))
    )
    for name, value in expected.items():
        assert_as_before(found[name], value, name)
    none = torch.zeros(1 + cases.GRADIENT_ENTRIES)
    for name in {*rows, *rows_before}:
        assert_as_before(rows.get(name, none), rows_before.get(name, none), f"norm and first entries of {name}")


def logits_of(model: Any) -> Tensor:
    pixels = cases.MODELS["vit"][1](True)["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels).logits


@pytest.mark.parametrize("form", ["whole", "selectors", "adapter"])
def test_checkpoint_of_version_1_loads_and_gives_its_logits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKPOINTS)  # selectors and adapter name their base by the folder beside them
    before = load_file("logits.safetensors")
    model = hf_hardattn.load(form)
    assert hf_hardattn.selectors(model)
    assert_as_before(logits_of(model), before[form], form)
    assert (before[form] - before["base"]).abs().max() > 0.01  # and not those of the soft model


def test_whole_checkpoint_of_version_1_loads_by_from_pretrained() -> None:
    model = ViTForImageClassification.from_pretrained(CHECKPOINTS / "whole").eval()
    assert_as_before(logits_of(model), load_file(CHECKPOINTS / "logits.safetensors")["whole"], "whole")


def test_budgets_of_schema_1_are_read_as_they_were_meant() -> None:
    """A count, all, a schedule that ends at a ratio, and a threshold; the count of positions kept tells them apart."""
    model = ViTForImageClassification.from_pretrained(CHECKPOINTS / "whole").eval()
    assert json.loads((CHECKPOINTS / "whole" / "config.json").read_text())["hard_attention"]["schema_version"] == 1
    with hf_hardattn.record(model) as selections:
        logits_of(model)
    kept = {site: selections.kept(selections[site][0]).sum(-1).flatten().tolist() for site in selections.sites}
    assert kept["vision.inputs"] == [13] * 3  # CLS and 12 patches
    assert kept["vision.tokens.0"] == [1 + 9] * 3  # CLS, and 0.7 of 13 rows with it
    assert kept.get("vision.self.0", [13] * 3) == [13] * 3  # a site that keeps all need not choose
