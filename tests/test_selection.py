"""The exact top-k and its indices against loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from examples import build
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hf_hardattn
from hf_hardattn import SiteConfig
from hf_hardattn.budget import Budget
from hf_hardattn.functional.topk import level_ties, mask_to_indices, topk_mask
from hf_hardattn.modeling.candidates import Protected
from hf_hardattn.modeling.choosing import choose
from hf_hardattn.modeling.context import Settings
from hf_hardattn.modeling.rows import candidates_among
from hf_hardattn.modeling.selection import Selection
from hf_hardattn.modeling.selector import Selector


def topk_by_loop(scores: list[float], k: int, valid: list[bool]) -> list[bool]:
    """Take the best valid position k times; the first of equal ones."""
    kept = [False] * len(scores)
    for _ in range(k):
        best = None
        for place, score in enumerate(scores):
            if valid[place] and not kept[place] and (best is None or score > scores[best]):
                best = place
        if best is not None:
            kept[best] = True
    return kept


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[R, N]`` with many ties, k ``[R]``, valid ``[R, N]``."""
    r, n = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    score = st.sampled_from([-1e30, -2.0, -0.0, 0.0, 1.5, 1e30]) | st.floats(-5, 5, width=32)
    scores = draw(st.lists(st.lists(score, min_size=n, max_size=n), min_size=r, max_size=r))
    valid = draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=r, max_size=r))
    k = draw(st.lists(st.integers(0, n + 2), min_size=r, max_size=r))
    return torch.tensor(scores), torch.tensor(k), torch.tensor(valid)


@settings(max_examples=150, deadline=None)
@given(rows())
def test_topk_mask_equals_the_loop(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """So: exactly min(k, valid) kept, ties to the lower index, never padding."""
    scores, k, valid = case
    mask = topk_mask(scores, k, valid)
    wanted = [topk_by_loop(s.tolist(), int(c), v.tolist()) for s, c, v in zip(scores, k, valid, strict=True)]
    assert mask.tolist() == wanted
    assert torch.equal(mask.sum(-1), torch.minimum(k, valid.sum(-1))) and not (mask & ~valid).any()
    slots = int(k.max())
    if slots:
        assert torch.equal(topk_mask(scores, k, valid, slots), mask)


@settings(max_examples=150, deadline=None)
@given(rows(), st.integers(0, 2**31))
def test_scores_that_differ_by_rounding_tie(case: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    exact, k, valid = case
    exact = (exact.clamp(-4, 4) * 8).round() / 8
    largest = exact.abs().masked_fill(~valid, 0.0).amax(-1, keepdim=True)
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    rounded = exact + 30 * torch.finfo(exact.dtype).eps * largest * noise
    levelled = level_ties(rounded, torch.minimum(k, valid.sum(-1)), valid, exact.shape[-1])
    wanted = [topk_by_loop(s.tolist(), int(c), v.tolist()) for s, c, v in zip(exact, k, valid, strict=True)]
    assert topk_mask(levelled, k, valid).tolist() == wanted


@pytest.mark.parametrize("budget", [1, 3, 40, 1e-7, 0.1, 1 / 3, 0.5, 0.999999])
def test_ranks_keep_what_count_says_and_the_protected(budget: Any) -> None:
    parsed, n, most = Budget.parse(budget, "here"), 30, 3
    available = torch.arange(n + 1)[:, None].expand(-1, most + 1).flatten()
    protected = torch.minimum(torch.arange(most + 1).repeat(n + 1), available)
    valid = torch.arange(n) < (available - protected)[:, None]
    count = protected + parsed.count(torch.zeros(valid.shape), valid)
    ranks = parsed.ranks(n, available[:, None], protected[:, None])
    assert torch.equal(ranks.sum(-1), count) and torch.equal(ranks, torch.arange(n) < count[:, None])
    for always in (0, 1):  # of each row that has any
        slots = parsed.slots(n - always) + always
        ranks = parsed.ranks(slots, available[:, None], always)
        alike = protected == available.clamp(max=always)
        assert torch.equal(ranks.sum(-1)[alike], count[alike])


@settings(max_examples=150, deadline=None)
@given(
    rows(),
    st.sampled_from([1, 3, 0.25, 0.7, 0.999, "threshold:0.5", "top_p:0.6"]),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_ragged_rows_keep_the_same_by_rank_as_by_mask(
    case: tuple[Tensor, Tensor, Tensor], budget: Any, first: int, last: bool, pack: bool, bounded: bool
) -> None:
    """Gathered execution ranks, masked execution counts; padding may stand anywhere, in front of the protected rows too."""
    scores, _, valid = case
    assume(first + last <= valid.shape[1])  # a tower has its protected rows
    config = SiteConfig(budget=budget, pack=pack, scorer="linear")
    selector = Selector(
        "text.tokens.0", config, hidden_size=4, query_size=4, heads=1, protected=Protected(first, last)
    ).eval()
    bound = max(int(valid.sum(-1).max()), first + last) if bounded else None
    candidates = candidates_among(selector.protected, valid, scores, bound)
    choose_by = partial(choose, selector, scores[:, None, None], scores[:, None, :, None], candidates)
    gathered, masked = (choose_by(Settings(execution=name), None) for name in ("gathered", "masked"))
    assert torch.equal(gathered.mask, masked.mask)
    assert torch.equal(gathered.slot_mask.sum(-1), masked.mask.sum(-1))


@settings(max_examples=100, deadline=None)
@given(rows())
def test_mask_to_indices_equals_the_loop(case: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, mask = case
    slots = max(1, int(mask.sum(-1).max()))
    indices = mask_to_indices(mask, slots)
    assert indices.dtype == torch.int64 and indices.shape == (*mask.shape[:-1], slots)
    for row, places in zip(mask.tolist(), indices.tolist(), strict=True):
        kept = [place for place, keep in enumerate(row) if keep]
        assert places[: len(kept)] == kept
        assert not any(row[place] for place in places[len(kept) :]) and len(set(places)) == slots


def test_topk_mask_broadcasts_and_takes_no_candidates() -> None:
    scores = torch.randn(2, 3, 4, 5)
    valid = torch.tensor([True, True, False, True, True])
    mask = topk_mask(scores, torch.tensor(2), valid)
    assert mask.shape == scores.shape and (mask.sum(-1) == 2).all() and not mask[..., 2].any()
    assert topk_mask(torch.zeros(3, 0), torch.tensor(1), torch.ones(3, 0, dtype=torch.bool)).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_topk_mask_in_half_precision(dtype: torch.dtype) -> None:
    """Rounding makes ties; the budget is still exact."""
    scores = torch.randn(50, 40).to(dtype)
    mask = topk_mask(scores, torch.tensor(13), torch.ones(40, dtype=torch.bool))
    wanted = [topk_by_loop(row, 13, [True] * 40) for row in scores.tolist()]
    assert mask.tolist() == wanted


def test_selection_properties() -> None:
    """Indices, slot mask and kept ratio; what is protected counts on neither side of the ratio."""
    mask = torch.tensor([[[[True, False, True, True, False]]], [[[True, False, False, False, False]]]])
    valid = torch.tensor([[[[True] * 5]], [[[True, True, False, False, False]]]])
    protected = torch.tensor([True, False, False, False, False]).expand(2, 1, 1, 5)
    selection = Selection("vision.tokens.3", mask, valid, protected, torch.zeros(2, 1, 1, 5), slots=3)
    assert selection.indices[0].flatten().tolist() == [0, 2, 3] and selection.indices[1, 0, 0, 0] == 0
    assert selection.slot_mask.flatten().tolist() == [True, True, True, True, False, False]
    assert selection.kept_ratio.flatten().tolist() == [0.5, 0.0]
    selection.protected = None
    assert selection.kept_ratio.flatten().tolist() == pytest.approx([0.6, 0.5])


class Wrapped(nn.Module):
    """A module around another one that passes on its attributes, as sharding and adapters do."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("scorer", ["linear", "mlp", "recurrent"])
def test_a_scorer_may_be_wrapped_later(scorer: str) -> None:
    """The facts that a selector reads once are those of the scorer, also when its budget changes behind a wrapper."""
    torch.manual_seed(0)
    made = build("vit", "ViTForImageClassification")
    model = hf_hardattn.apply(made.model, {"sites": ["vision.tokens.0"], "budget": 4, "scorer": scorer}).eval()
    batch = made.batch
    expected = model(**batch).logits
    for selector in hf_hardattn.selectors(model).values():
        selector.scorer = Wrapped(selector.scorer)
    assert torch.equal(model(**batch).logits, expected)
    again = hf_hardattn.set_budget(hf_hardattn.set_budget(model, 2), 4)
    assert torch.equal(again(**batch).logits, expected)
