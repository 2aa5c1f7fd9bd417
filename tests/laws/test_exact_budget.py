"""Law 10: exactly the budget is kept, ties to the lower index; the always-kept are not counted; all-padding rows stay finite."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ESTIMATORS, HEADS, Case, cases, hard, harden, head_places, run, stock, train_loss
from torch import nn

import hf_hardattn
from hf_hardattn import registry

EXACT = [name for name in ESTIMATORS if registry.load("estimators", name).exact_budget]  # in training


def oracle(selection, row, head, query, budget):
    """The kept positions by sorting in Python: highest first, ties to the lower index; the protected one besides."""
    scores, valid = selection.scores[row, head, query].tolist(), selection.valid[row, head, query].tolist()
    always = [False] * len(scores)
    if selection.protected is not None:
        always = selection.protected.expand_as(selection.mask)[row, head, query].tolist()
    free = [n for n in range(len(scores)) if valid[n] and not always[n]]
    if isinstance(budget, int):
        k = budget
    elif isinstance(budget, float):
        k = math.ceil(round(budget * 1e6) * len(free) / 1e6)
    elif budget.startswith("threshold"):
        k = sum(1 / (1 + math.exp(-scores[n])) > float(budget.split(":")[1]) for n in free)
    else:
        top, total, k = sorted((scores[n] for n in free), reverse=True), 0.0, 0
        mass = sum(math.exp(s - top[0]) for s in top) if top else 1.0
        while k < len(top) and total < float(budget.split(":")[1]) - 1e-7:
            total, k = total + math.exp(top[k] - top[0]) / mass, k + 1
    k = min(max(k, 1), len(free))
    return sorted(
        sorted(free, key=lambda n: (-scores[n], n))[:k] + [n for n, kept in enumerate(always) if kept and valid[n]]
    )


def assert_kept(selection, budget):
    batch, heads, queries, _ = selection.mask.shape
    for row in range(batch):
        for head in range(heads):
            for query in range(queries):
                kept = selection.mask[row, head, query].nonzero().flatten().tolist()
                assert kept == oracle(selection, row, head, query, budget)
                assert selection.indices[row, head, query][: len(kept)].tolist() == kept


@pytest.mark.parametrize("case", cases(), ids=str)
def test_exactly_the_budget_is_kept(case):
    example = hard(case)
    with hf_hardattn.record(example.model) as selections:
        run(example)
    assert selections
    for selection in selections:
        assert_kept(selection, case.budget)
        if case.place.kind in ("inputs", "tokens"):
            first, last = hf_hardattn.selectors(example.model)[selection.site].protected
            assert (selection.protected is not None and selection.protected.any(-1).all()) == bool(first or last)


@pytest.mark.parametrize(("head", "place"), head_places())
def test_ties_go_to_the_lower_index(head, place):
    example = hard(Case(place, head, budget=3))
    for selector in hf_hardattn.selectors(example.model).values():
        nn.init.zeros_(selector.scorer.weight)
    with hf_hardattn.record(example.model) as selections:
        run(example)
    for selection in selections:
        assert_kept(selection, 3)


@pytest.mark.parametrize("case", cases(("linear",), EXACT, (2, 0.5)), ids=str)
def test_training_keeps_exactly_the_budget(case):
    example = hard(case)
    with hf_hardattn.record(example.model) as selections:
        train_loss(example)
    for selection in selections:
        free = selection.valid if selection.protected is None else selection.valid & ~selection.protected
        if selection.gates is not None:
            assert torch.equal(selection.gates > 0, selection.mask)
        count = free.sum(-1)
        k = torch.full_like(count, 2) if case.budget == 2 else -(-count // 2)
        kept = selection.mask if selection.protected is None else selection.mask & ~selection.protected
        assert torch.equal(kept.sum(-1), torch.minimum(k, count)) and not (kept & ~free).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("architecture", "head"), [h for h in HEADS if "attention_mask" in stock(*h).batch])
def test_a_row_of_padding_stays_finite(architecture, head, estimator):
    example = stock(architecture, head)
    example.batch["attention_mask"][1] = 0
    example.batch["attention_mask"][2, 1:] = 0  # fewer valid positions than the budget
    harden(example.model, {"sites": ["*"], "budget": 3, "estimator": estimator, "baseline": "none"})
    for mode in ("gathered", "masked"):
        with hf_hardattn.execution(example.model, mode):
            assert all(value.isfinite().all() for value in run(example).values())
    loss = train_loss(example)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in example.model.parameters())
