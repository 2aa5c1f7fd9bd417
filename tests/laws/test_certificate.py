"""Law 3: with ``inputs`` sites, no dropped token or patch can change the output, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import SCORERS, Example, cases, hard, harden, run, stock

import hf_hardattn
from hf_hardattn import registry

CASES = cases(budgets=(1, 3, 0.4, "top_p:0.5"), where=lambda place: place.kind == "inputs")


def replaced(example, case, selections, how):
    """The example with what its ``inputs`` site dropped replaced."""
    made = selections[case.place.group][0]
    tower = case.place.group.split(".")[0]
    dropped = (made.valid & ~made.mask)[:, 0, 0].expand(3, -1)
    assert dropped.any()
    architecture = registry.load("architectures", case.place.architecture)
    batch = architecture.replace_inputs(example.model, example.batch, {tower: dropped}, how, 0)
    assert any(not torch.equal(value, example.batch[name]) for name, value in batch.items() if torch.is_tensor(value))
    return Example(example.model, batch)


@pytest.mark.parametrize("mode", ["gathered", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_dropped_cannot_change_the_output(case, mode):
    example = hard(case)
    with hf_hardattn.execution(example.model, mode):
        with hf_hardattn.record(example.model) as selections:
            expected = run(example)
        for how in ("noise", "zero", "swap"):
            with hf_hardattn.replay(example.model, selections):
                found = run(replaced(example, case, selections, how))
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", CASES[:: len(SCORERS)], ids=str)
def test_later_sites_do_not_break_the_certificate(case):
    example = stock(case.place.architecture, case.head)
    tower = case.place.group.split(".")[0]
    harden(example.model, {"sites": [f"{tower}.*"], "scorer": "mlp", "budget": 0.6})
    with hf_hardattn.record(example.model) as selections:
        expected = run(example)
    with hf_hardattn.replay(example.model, selections):
        found = run(replaced(example, case, selections, "noise"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", CASES[:: len(SCORERS)], ids=str)
def test_the_certificate_fails_when_a_kept_one_is_replaced(case):
    example = hard(case)
    with hf_hardattn.record(example.model) as selections:
        expected = run(example)
    made = selections[case.place.group][0]
    made.mask, made.valid = ~made.mask & made.valid, made.valid
    changed = replaced(example, case, selections, "noise")
    made.mask = ~made.mask & made.valid
    with hf_hardattn.replay(example.model, selections):
        found = run(changed)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)
