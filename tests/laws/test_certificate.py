"""Law 3: with ``inputs`` sites, no dropped token or patch can change the output, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import SCORERS, Example, cases, hard, harden, run, stock

import hf_hardattn
from hf_hardattn import models

CASES = cases(budgets=(1, 3, 0.4, "top_p:0.5"), where=lambda place: place.kind == "inputs")


# T5's question answering and classification show the input to the decoder as well, shifted: the certificate is the encoder's
DECODER_READS_INPUT = ("T5ForQuestionAnswering", "T5ForSequenceClassification")


def assert_same(found, expected):
    """Bit for bit; not the loss of masked image modelling, whose target is the image itself."""
    assert all(
        torch.equal(found[name], expected[name])
        for name in expected
        if name != "loss" or "reconstruction" not in expected
    )


def visible(example, case):
    """The example with the decoder's input given, so that replacing the encoder's leaves it alone."""
    if case.head in DECODER_READS_INPUT:
        example.batch["decoder_input_ids"] = example.batch["input_ids"].clone()
    return example


def replaced(example, case, selections, how):
    """The example with what its ``inputs`` site dropped replaced."""
    made = selections[case.place.group][0]
    tower = case.place.group.split(".")[0]
    dropped = (made.valid & ~made.mask)[:, 0, 0].expand(3, -1)
    assert dropped.any()
    architecture = models.load(case.place.architecture)
    batch = architecture.replace_inputs(example.model, example.batch, {tower: dropped}, how, seed=7)
    assert any(not torch.equal(value, example.batch[name]) for name, value in batch.items() if torch.is_tensor(value))
    return Example(example.model, batch)


@pytest.mark.parametrize("mode", ["gathered", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_dropped_cannot_change_the_output(case, mode):
    example = visible(hard(case), case)
    with hf_hardattn.execution(example.model, mode):
        with hf_hardattn.record(example.model) as selections:
            run(example)
        with hf_hardattn.replay(example.model, selections):
            expected = run(example)
        for how in ("noise", "zero", "swap"):
            with hf_hardattn.replay(example.model, selections):
                found = run(replaced(example, case, selections, how))
            assert_same(found, expected)


@pytest.mark.parametrize("case", CASES[:: len(SCORERS)], ids=str)
def test_later_sites_do_not_break_the_certificate(case):
    example = stock(case.place.architecture, case.head)
    tower = case.place.group.split(".")[0]
    harden(visible(example, case).model, {"sites": [f"{tower}.*"], "scorer": "mlp", "budget": 0.6})
    with hf_hardattn.record(example.model) as selections:
        run(example)
    with hf_hardattn.replay(example.model, selections):
        expected = run(example)
    with hf_hardattn.replay(example.model, selections):
        found = run(replaced(example, case, selections, "noise"))
    assert_same(found, expected)


@pytest.mark.parametrize("case", CASES[:: len(SCORERS)], ids=str)
def test_the_certificate_fails_when_a_kept_one_is_replaced(case):
    example = visible(hard(case), case)
    with hf_hardattn.record(example.model) as selections:
        expected = run(example)
    made = selections[case.place.group][0]
    made.mask, made.valid = ~made.mask & made.valid, made.valid
    changed = replaced(example, case, selections, "noise")
    made.mask = ~made.mask & made.valid
    with hf_hardattn.replay(example.model, selections):
        found = run(changed)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_verify_names_who_else_reads_the_input():
    """T5's classification and question-answering heads feed the shifted input to their decoder: no certificate, and no 'bug'."""
    example = stock("t5", "T5ForQuestionAnswering")
    hf_hardattn.apply(example.model, {"sites": ["encoder.inputs"], "budget": 2})
    (site,) = hf_hardattn.verify(example.model, example.batch).sites
    assert (
        not site.certified and "through the decoder, which this head feeds with the shifted input_ids" in site.statement
    )
