"""The comparison of two versions: its cases are what they say, and it sees the smallest difference."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts" / "research"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cases, compare = script("version_cases"), script("compare_versions")


def test_names_of_cases_are_unique_and_every_case_can_be_run() -> None:
    found = cases.load_cases()
    assert len({case.name for case in found}) == len(found)
    assert all(case.model in cases.MODELS and case.run in cases.RUNS for case in found)


def test_labels_of_several_axes_merge_their_configurations() -> None:
    (case,) = (case for case in cases.load_cases(["vit"]) if case.name == "vit/train/tokens/gumbel/eager/reentrant")
    assert case.hard == {"sites": ["vision.tokens.0", "vision.tokens.1"], "estimator": "gumbel"}
    assert (case.attention, case.checkpointing, case.tolerance) == ("eager", {"use_reentrant": True}, 0)


def test_a_case_equals_itself_bit_for_bit_and_differs_after_a_change_of_its_weights() -> None:
    (case,) = (case for case in cases.load_cases(["vit"]) if case.name == "vit/train/tokens/simple/sdpa/plain")
    first, second = cases.run_case(case), cases.run_case(case)
    assert compare.compare_case(first, second, 0.0)["bit_equal"]
    second["gradient/vision.tokens.0/scorer.weight"] += 1e-6
    row = compare.compare_case(first, second, 0.0)
    assert not row["within"] and row["worst"] == "gradient/vision.tokens.0/scorer.weight"
    assert row["difference"]["loss"] == 0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (torch.ones(2), torch.ones(2), 0.0),
        (torch.tensor([4.0, 0.0]), torch.tensor([4.0, 1.0]), 0.25),
        (torch.tensor([0.0]), torch.tensor([0.5]), 0.5),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), math.inf),
        (torch.ones(2), torch.ones(3), math.inf),
        (torch.ones(1), torch.tensor([math.nan]), math.inf),
        (None, torch.zeros(2), 0.0),  # no gradient is a gradient of zeros
        (None, torch.ones(2), 1.0),
    ],
)
def test_difference(before: torch.Tensor | None, after: torch.Tensor | None, expected: float) -> None:
    assert compare.difference(before, after) == expected
