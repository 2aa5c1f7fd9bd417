"""Law 1: budget 1.0 is the stock model, in logits, loss and generate(); so is a hard model inside ``soft``."""

from __future__ import annotations

import pytest
import torch
from cases import (
    ESTIMATORS,
    HEADS,
    SCORERS,
    all_sites,
    can_generate,
    cases,
    close,
    hard,
    harden,
    has_kind,
    head_places,
    run,
    stock,
    tensors,
)
from rounding import FEW

import hf_hardattn
from hf_hardattn.models import family_of


def padded(place) -> bool:
    """Stock BLIP drops the mask of the questions on its way to the answer decoder; a selector never keeps padding."""
    return place.group != "answer.cross"


CASES = cases(SCORERS, ESTIMATORS, budgets=(1.0, 1000))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeping_all_is_the_stock_model(case):
    expected = run(stock(case.place.architecture, case.head, padded(case.place)))
    for mode in ("auto", "masked"):
        close(run(hard(case, padded(case.place), execution=mode)), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.scorer != "random" and c.estimator != "distil"][::3], ids=str)
def test_keeping_all_trains_like_the_stock_model(case):
    example = stock(case.place.architecture, case.head, padded(case.place))
    example.model.train()
    close(run(_train(hard(case, padded(case.place)))), run(example))


def _train(example):
    example.model.train()
    return example


@pytest.mark.parametrize("case", cases(("mlp",), ("soft",)), ids=str)
def test_the_soft_estimator_ignores_the_budget(case):
    expected = run(stock(case.place.architecture, case.head, padded(case.place)))
    for mode in ("auto", "masked"):
        close(run(hard(case, padded(case.place), execution=mode)), expected)


@pytest.mark.parametrize(("head", "place"), [x for x in head_places() if can_generate(x[1].architecture, x[0])])
def test_keeping_all_generates_the_same(head, place):
    example = stock(place.architecture, head, padded(place))
    inputs = {name: x for name, x in example.batch.items() if name not in ("labels", "decoder_input_ids")}
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 4}
        expected = example.model.generate(**inputs, **options)
        changed = stock(place.architecture, head, padded(place)).model
        scorer = "query_key" if place.kind in ("self", "cross") else "linear"
        harden(changed, {"sites": [place.pattern], "budget": 1.0, "scorer": scorer})
        assert torch.equal(changed.generate(**inputs, **options), expected)


@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_soft_is_the_stock_model(architecture, head):
    example = stock(architecture, head)
    expected = run(example)
    before = list(example.model.state_dict())
    harden(example.model, {"sites": ["*"], "budget": 1})
    with hf_hardattn.soft(example.model):
        found = run(example)
    assert found.keys() == expected.keys() and len(all_sites(example.model)) == len(
        hf_hardattn.selectors(example.model)
    )
    close(found, expected, FEW)  # not bit for bit: stock BLIP computes attention eagerly, Hard BLIP through SDPA
    if architecture != "blip":
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = run(example)
    assert any(found[n].shape != changed[n].shape or not torch.equal(found[n], changed[n]) for n in found)
    assert set(before) <= set(example.model.state_dict())


@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_attentions_and_hidden_states_are_returned(architecture, head):
    """With budget 1.0 the same tensors as stock; below, the same number of them."""
    example = stock(architecture, head, padded=False, attn_implementation="eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    expected = run(example, **asked)
    harden(example.model, {"sites": ["*"], "budget": 1.0})
    close(run(example, **asked), expected)
    if not has_kind(architecture, head, "self"):
        return
    hf_hardattn.apply(example.model, {"sites": ["*.self.*"], "budget": 3})
    with torch.no_grad():
        output = example.model(**example.batch, **asked)
    found = tensors(output)
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    for name, value in found.items():
        if "attentions" in name and "cross" not in name:
            assert ((value > 0).sum(-1) <= 3 + protected(example.model, name)).all() and torch.allclose(
                value.sum(-1), torch.ones(())
            )


def protected(model, name):
    """Rows always kept among the keys of an attention."""
    towers = family_of(model).towers(model)
    return max(tower.protected.rows for tower in towers.values())
