"""The estimator ``marginal`` in the laws. It tries every choice of ONE site and needs labels, so it stands at the last layer of a
place, keeps one position, and takes the heads that tell a loss of each label; the other files hold the estimators that need less."""

from __future__ import annotations

import pytest
import torch
from cases import PLACES, THOROUGH, Case, all_sites, close, hard, has_loss, refusal, run, stock, train_loss

import hf_hardattn
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.models import family_of


def _head(place):
    """A head of the place that tells the loss of each label; None where there is none."""
    for head in place.heads:
        example = stock(place.architecture, head)
        if has_loss(example):
            model, architecture = example.model, family_of(example.model)
            with torch.no_grad():
                told = architecture.token_loss(model, example.batch, model(**example.batch)) is not None
            if told and architecture.labels(model, example.batch) is not None:
                return head
    return None


def _cases():
    for place in PLACES:
        head = _head(place)
        for scorer in ("linear", "query_key"):
            served = head is not None and refusal(place, scorer) is None
            # queries of the decoder choose for themselves, and only in its cross-attention is the next layer the labels
            if served and (place.kind == "cross" or not place.causal and scorer == "linear"):
                yield Case(place, head, scorer, "marginal", 1)


CASES = list(_cases())


def marginal(case, padded=True, **changes):
    """The example with ``marginal`` at the last site of the place only."""
    site = [s for s in all_sites(stock(case.place.architecture, case.head).model) if s.startswith(case.place.group)][-1]
    return hard(case, padded, **{"sites": [site], **changes})


def gradients(example):
    loss = train_loss(example)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in example.model.named_parameters() if p.grad is not None}


def test_every_architecture_and_kind_of_site_is_covered():
    assert {case.place.kind for case in CASES} == {"self", "cross", "tokens", "inputs"}
    assert {case.place.architecture for case in CASES} == set(THOROUGH)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget_one_is_the_stock_model(case):
    """Law 1, the training loss too: all that can be kept is one choice (in rows of one length, as it must be for all)."""
    soft, example = stock(case.place.architecture, case.head, False), marginal(case, False, budget=1.0)
    close(run(example), run(soft))
    torch.testing.assert_close(train_loss(example), train_loss(soft), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_scorer_learns(case):
    """Every parameter of the selector gets a finite gradient, and one that is not zero."""
    example = marginal(case)
    _, found = gradients(example)
    selected = {name: gradient for name, gradient in found.items() if "selector" in name}
    assert selected.keys() == {name for name, _ in example.model.named_parameters() if "selector" in name}
    assert all(gradient.isfinite().all() for gradient in selected.values())
    assert max(gradient.abs().max() for name, gradient in selected.items() if "weight" in name) > 0


def test_checkpointing_is_refused():
    """Law 9: the passes' choices come from outside, so that they could not be replayed when a layer is computed again."""
    example = marginal(CASES[0])
    example.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(
        HardAttentionError, match=r"does not support gradient checkpointing: .*\.gradient_checkpointing_disable"
    ):
        train_loss(example)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case):
    """Law 11: at temperature 0.1 the loss and the gradients are numbers in bf16, and the scores stay fp32."""
    example = marginal(case, temperature=0.1)
    example.model.to(torch.bfloat16)
    for name, value in example.batch.items():
        if torch.is_tensor(value) and value.is_floating_point():
            example.batch[name] = value.to(torch.bfloat16)
    with hf_hardattn.record(example.model) as selections:
        loss, found = gradients(example)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in found.values())
    assert selections[0].scores.dtype == torch.float32


def test_rows_that_share_a_loss_are_refused():
    """A contrastive loss reads every row's choice: no sum over one row's choices is its marginal."""
    place = next(place for place in PLACES if "BlipModel" in place.heads)
    example = marginal(Case(place, "BlipModel", "linear", "marginal", 1))
    with pytest.raises(HardAttentionError, match="BlipModel has no labels to weigh .* needs labels"):
        train_loss(example)
