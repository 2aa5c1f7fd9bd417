"""Rows that keep different counts are computed on end to end: the same outputs and gradients as padded to the longest, at their own cost."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from cases import (
    HEADS,
    Case,
    Example,
    all_sites,
    averages,
    close,
    hard,
    harden,
    head_places,
    run,
    stock,
    tensors,
    train_loss,
)
from rounding import MANY

import hf_hardattn
from hf_hardattn import models
from hf_hardattn.functional.varlen import Packing

# one choice serves all queries of a row, and the rows of a batch may keep different counts
ONCE = [(head, place) for head, place in head_places(lambda p: not p.causal) if not averages(head, place)]


def reads_images(place):
    """Images have no padding."""
    return place.group.startswith("vision") or place.group == "text.cross"


@pytest.fixture
def packed(monkeypatch):
    """Packs however little it saves; lists the lengths of the rows, packing by packing."""
    found: list[tuple[tuple[int, int], ...]] = []
    to_packed = Packing.to_packed

    def note(self, rows):
        found.append(self.runs)
        return to_packed(self, rows)

    monkeypatch.setattr("hf_hardattn.functional.varlen.WASTE", 0.0)
    monkeypatch.setattr(Packing, "to_packed", note)
    return found


def unlike(case, packed, compare):
    """Compare ``pack`` False with None, for the first selectors whose rows keep different counts."""
    for seed in range(5):
        example = stock(case.place.architecture, case.head)
        expected = compare(Example(harden(example.model, case.config(pack=False), seed), example.batch))
        assert not packed
        example = stock(case.place.architecture, case.head)
        found = compare(Example(harden(example.model, case.config(), seed), example.batch))
        close(found, expected, MANY)
        if packed:
            return
    pytest.fail("nothing was packed")


@pytest.mark.parametrize(
    ("head", "place", "budget"), [(*x, ("threshold:0.5", "top_p:0.6")[i % 2]) for i, x in enumerate(ONCE)]
)
def test_packed_is_padded(head, place, budget, packed):
    unlike(Case(place, head, budget=budget), packed, run)


@pytest.mark.parametrize(("head", "place"), list({(p.architecture, p.group): (h, p) for h, p in ONCE}.values()))
def test_training_packed_is_training_padded(head, place, packed):
    def gradients(example):
        train_loss(example).backward()
        return {name: p.grad for name, p in example.model.named_parameters() if p.grad is not None}

    unlike(Case(place, head, estimator="reinforce", budget="top_p:0.6"), packed, gradients)


PADDED = [
    (head, p) for head, p in ONCE if "attention_mask" in stock(p.architecture, head).batch and not reads_images(p)
]


@pytest.mark.parametrize(("head", "place"), PADDED)
def test_padding_alone_is_packed_on_demand(head, place, packed):
    case = Case(place, head, budget=0.5)
    expected = run(hard(case))
    assert not packed  # None packs only where the host must ask for the counts anyway
    close(run(hard(case, pack=True)), expected)
    assert packed


@pytest.mark.parametrize(
    ("architecture", "head"), [h for h in HEADS if h[1] not in models.load(h[0]).spec.averaging_heads]
)
def test_all_sites_together_and_what_else_a_model_returns(architecture, head, packed):
    mixed = {
        "*.inputs": {"budget": "threshold:0.4"},
        "*.tokens.0": {"budget": 0.7},
        "*.tokens.1": {"budget": "top_p:0.8"},
    }
    mixed |= {"*.self.1": {"budget": "threshold:0.5"}, "*.cross.*": {"budget": "top_p:0.7"}}
    example = stock(architecture, head)
    if hasattr(example.model, "set_attn_implementation"):
        example.model.set_attn_implementation("eager")
    sites = {
        name: value
        for name, value in mixed.items()
        if any(fnmatchcase(site, name) for site in all_sites(example.model))
    }
    other = copy.deepcopy(example)
    harden(example.model, {"sites": sites, "scorer": "linear"})
    harden(other.model, {"sites": sites, "scorer": "linear", "pack": False})
    close(run(example), run(other))
    assert packed
    asked = dict(output_hidden_states=True, output_attentions=True)
    close(run(example, **asked), run(other, **asked))


def test_rows_of_equal_length_lie_side_by_side():
    torch.manual_seed(0)
    lengths, slots = (3, 1, 5, 3), 5
    packing = Packing.of(lengths, slots, torch.device("cpu"))
    rows = torch.randn(4, slots, 6)
    packed = packing.to_packed(rows)
    expected = torch.cat([rows[b, : lengths[b]] for b in (1, 0, 3, 2)])
    assert torch.equal(packed[0], expected) and packing.runs == ((1, 1), (3, 2), (5, 1))
    back = packing.to_padded(packed)
    for b, length in enumerate(lengths):
        assert torch.equal(back[b, :length], rows[b, :length])
        assert torch.equal(back[b, length:], rows[b, length - 1 : length].expand(slots - length, -1))
    heads = packed.unflatten(-1, (2, 3)).transpose(1, 2)  # [1, H, T, d]
    for numbers, (part,) in packing.batches(heads):
        assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()  # a view
        for row, states in zip(numbers.tolist(), part.transpose(1, 2).flatten(2), strict=True):
            assert torch.equal(states, rows[row, : lengths[row]])


@pytest.mark.parametrize(
    ("lengths", "slots"), [(None, 4), ((4, 4), 4), ((4, 4, 4, 3), 4), ((0, 4), 4), ((9,), 9)], ids=str
)
def test_nothing_is_packed_where_it_saves_nearly_nothing(lengths, slots):
    assert Packing.of(lengths, slots, torch.device("cpu")) is None


def test_rows_of_one_count_need_no_mask():
    """One image under a threshold fills all its slots: no mask, no packing."""
    example = hard(Case(ONCE[-1][1], ONCE[-1][0], budget="threshold:0.5"))
    batch = {name: value[:1] if torch.is_tensor(value) else value for name, value in example.batch.items()}
    with hf_hardattn.record(example.model) as selections, torch.no_grad():
        tensors(example.model(**batch))
    assert all(s.dense and s.lengths is None and s.slots == int(s.mask.sum()) for s in selections)
