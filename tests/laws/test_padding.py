"""Law 4: a batch equals its rows one by one, however they are padded; no position of a decoder sees its future."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import SCORERS, Case, Example, averages, cases, hard, head_places, refusal, run
from rounding import FEW, SOME, assert_rounded

import hf_hardattn


def alone(example, row):
    """One row of the batch, without its padding."""
    mask = example.batch.get("attention_mask")
    length = None if mask is None else int(mask[row].sum())
    batch = {}
    for name, value in example.batch.items():
        if torch.is_tensor(value):
            value = value[row : row + 1]
            if mask is not None and value.shape == mask[:1].shape:
                value = value[:, :length]
        batch[name] = value
    return Example(example.model, batch), length


def assert_rows_alone(example, skip=(), units=2 * SOME):
    """Compare every output that belongs to one row with the row's own."""
    together = run(example)
    rows, padded = len(next(iter(example.batch.values()))), example.batch.get("attention_mask")
    for row in range(rows):
        single, length = alone(example, row)
        for name, value in run(single).items():
            if value.dim() == 0 or name.startswith("logits_per") or name in skip:
                continue
            expected = together[name][row]
            if padded is not None and expected.shape[:1] == padded.shape[1:]:
                expected, value = expected[:length], value[:, :length]
            rest = expected[value.shape[1] :]  # gathered rows: the longest row of the batch sets the slots
            assert expected.dim() < 2 or not rest.any()
            assert_rounded(value[0], expected[: value.shape[1]], units, name)


def padded(case):
    """Stock VQA's answers read the padding of the question, unless a selector keeps it out."""
    return case.head != "BlipForQuestionAnswering" or case.place.group == "answer.cross"


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_batch_is_its_rows_one_by_one(case):
    example = hard(case, padded(case))
    assert_rows_alone(example)


@pytest.mark.parametrize("mode", ["gathered", "masked"])
@pytest.mark.parametrize(
    ("head", "place"),
    [
        (head, place)
        for head, place in head_places(lambda p: p.kind in ("inputs", "tokens"))
        if not averages(head, place)
    ],
)
def test_a_row_keeps_what_it_is_given_when_another_is_given_all(head, place, mode):
    case = Case(place, head, budget=2)
    site = next(iter(hf_hardattn.selectors(hard(case).model)))
    example = hard(case, padded(case), sites=[site])
    with hf_hardattn.execution(example.model, mode), hf_hardattn.record(example.model) as selections:
        expected = run(example)
    given = selections[0].mask.clone()
    given[0] = selections[0].valid[0]
    with hf_hardattn.execution(example.model, mode), hf_hardattn.replay(example.model, {site: given}):
        found = run(example)
    changed = False
    for name, value in expected.items():
        if value.dim() == 0 or name.startswith("logits_per"):
            continue
        for row in range(len(value)):
            one, other = found[name][row], value[row]
            if other.dim() > 1:  # gathered rows: the longest row of the batch sets the slots
                assert row == 0 or not one[len(other) :].any()
                one = one[: len(other)]
            if row == 0:
                changed |= not torch.allclose(one, other, atol=1e-3)
                continue
            assert_rounded(one, other, 2 * SOME, name)
    assert changed or head == "BlipForQuestionAnswering"  # which returns nothing but its loss


def has_left_padding(place):
    """Relative positions only: BLIP's text has absolute ones."""
    return place.architecture == "t5"


@pytest.mark.parametrize(
    "case", cases(("linear", "query_key", "first"), budgets=(2, 0.5), where=has_left_padding), ids=str
)
def test_padding_left_or_right_is_the_same(case):
    if case.head in ("T5ForSequenceClassification", "T5ForQuestionAnswering"):
        case = replace(case, head="T5ForConditionalGeneration")  # those feed the padding to their decoder, unmasked
    example = hard(case)
    batch, mask = example.batch, example.batch["attention_mask"]
    right = run(example)
    left = dict(batch)
    for row, shift in enumerate((1 - mask).sum(1).tolist()):
        for name, value in batch.items():
            if torch.is_tensor(value) and value.shape == mask.shape:
                left[name] = left[name].clone()
                left[name][row] = value[row].roll(shift)
    found = run(Example(example.model, left))
    for name, value in right.items():
        if value.dim() == 0:
            continue
        for row, shift in enumerate((1 - mask).sum(1).tolist()):
            one, other = value[row], found[name][row]
            if value.shape[1] == mask.shape[1]:
                one, other = one[: len(one) - shift], other[shift:]
            assert_rounded(other, one, 2 * SOME, name)


DECODERS = {
    "T5Model": "decoder_input_ids",
    "T5ForConditionalGeneration": "decoder_input_ids",
    "BlipForConditionalGeneration": "input_ids",
    "BlipForQuestionAnswering": "labels",
}
CAUSAL = [
    (head, place)
    for head, place in head_places(lambda p: p.causal or p.kind == "cross")
    if head in DECODERS and (head, place.group) != ("BlipForQuestionAnswering", "text.cross")
]


@pytest.mark.parametrize("scorer", [name for name in SCORERS if any(refusal(p, name) is None for _, p in CAUSAL)])
@pytest.mark.parametrize(("head", "place"), CAUSAL)
def test_a_decoder_does_not_see_its_future(head, place, scorer):
    if refusal(place, scorer) is not None:
        return
    name = DECODERS[head]
    for mode in ("gathered", "masked"):
        example = hard(Case(place, head, scorer, "reinforce", 0.5), padded=False, execution=mode)
        if name != "labels":
            example.batch.pop("labels", None)
        expected = decoder_logits(example)
        cut = example.batch[name].shape[1] // 2
        example.batch[name] = example.batch[name].clone()
        example.batch[name][:, cut + 1 :] = example.batch[name][:, cut + 1 :] % 40 + 3
        found = decoder_logits(example)
        assert_rounded(found[:, : cut + 1], expected[:, : cut + 1], FEW)
        assert not torch.allclose(found[:, cut + 1 :], expected[:, cut + 1 :], atol=1e-3)


def decoder_logits(example):
    """What the decoder says at each position; VQA returns only a loss, so its decoder is asked."""
    kept = {}
    decoder = getattr(example.model, "text_decoder", example.model)
    handle = decoder.register_forward_hook(lambda module, args, output: kept.update(output))
    try:
        run(example)
    finally:
        handle.remove()
    return kept["logits"] if "logits" in kept else kept["last_hidden_state"]
