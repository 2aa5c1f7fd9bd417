"""Law 7: apply then remove is exact; apply over apply is the last one alone; copies and pickles are hard."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import HEADS, Example, close, harden, run, stock

import hf_hardattn

CONFIG = {"sites": ["*"], "budget": 2}


def facts(model):
    """Everything that says what a model is: classes, parameters, buffers, hooks, configurations."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [sorted(set(module.__dict__) - {"_is_hf_initialized"}) for module in model.modules()],
        model.config.to_dict(),
    )


@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_apply_then_remove_is_exact(architecture, head):
    example = stock(architecture, head)
    expected, weights, before = run(example), copy.deepcopy(example.model.state_dict()), facts(example.model)
    harden(example.model, CONFIG)
    assert any("selector" in name for name in example.model.state_dict())
    run(example)
    assert hf_hardattn.remove(example.model) is example.model
    found, restored = run(example), example.model.state_dict()
    assert list(restored) == list(weights) and all(torch.equal(restored[name], weights[name]) for name in weights)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert facts(example.model) == before
    hf_hardattn.remove(example.model)  # nothing left to remove
    assert facts(example.model) == before


@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_the_last_apply_counts(architecture, head):
    example, twice = stock(architecture, head), stock(architecture, head)
    other = {"sites": ["*.[sc]*.*"], "budget": 3, "scorer": "mlp"}
    harden(example.model, other)
    harden(harden(twice.model, CONFIG) and twice.model, other)
    assert list(twice.model.state_dict()) == list(example.model.state_dict())
    assert facts(twice.model) == facts(example.model)
    close(run(twice), run(example), 0)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_copies_are_hard_and_independent(architecture, head, copier):
    example = stock(architecture, head)
    harden(example.model, CONFIG)
    expected = run(example)
    twin = Example(copier(example.model), example.batch)
    close(run(twin), expected, 0)
    with hf_hardattn.soft(twin.model):
        soft = run(twin)
        close(run(example), expected, 0)
    hf_hardattn.remove(twin.model)
    close(run(twin), soft)
    close(run(example), expected, 0)
