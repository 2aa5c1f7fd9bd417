"""The estimator ``marginal`` in the laws. It tries every choice of ONE site and needs labels, so it stands at the last layer of a
place, keeps one position, and takes the heads that tell a loss of each label; the other files hold the estimators that need less."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import PLACES, Case, all_sites, close, hard, has_loss, refusal, run, stock, train_loss

import hf_hardattn
from hf_hardattn.architectures import architecture_of
from hf_hardattn.errors import HardAttentionError


def _head(place):
    """A head of the place with labels; None where there is none."""
    for head in place.heads:
        example = stock(place.architecture, head)
        if has_loss(example) and architecture_of(example.model).labels(example.model, example.batch) is not None:
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


def marginal(case, **changes):
    """The example with ``marginal`` at the last site of the place only."""
    site = [s for s in all_sites(stock(case.place.architecture, case.head).model) if s.startswith(case.place.group)][-1]
    return hard(case, **{"sites": [site], **changes})


def gradients(example):
    loss = train_loss(example)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in example.model.named_parameters() if p.grad is not None}


def test_every_architecture_and_kind_of_site_is_covered():
    assert {case.place.kind for case in CASES} == {"self", "cross", "tokens", "inputs"}
    assert {case.place.architecture for case in CASES} == {"t5", "vit", "blip"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget_one_is_the_stock_model(case):
    """Law 1, the training loss too: all that can be kept is one choice."""
    soft, example = stock(case.place.architecture, case.head), marginal(case, budget=1.0)
    close(run(example), run(soft))
    torch.testing.assert_close(train_loss(example), train_loss(soft), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_scorer_learns_and_checkpointing_changes_no_gradient(case):
    """Law 9, and finite gradients for every parameter of the selector."""
    example = marginal(case)
    again = copy.deepcopy(example)
    loss, expected = gradients(example)
    selected = {name: gradient for name, gradient in expected.items() if "selector" in name}
    wanted = {name for name, _ in example.model.named_parameters() if "selector" in name}
    assert selected.keys() == wanted and all(gradient.isfinite().all() for gradient in selected.values())
    assert max(gradient.abs().max() for name, gradient in selected.items() if "weight" in name) > 0
    again.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    repeated, found = gradients(again)
    torch.testing.assert_close(repeated, loss, rtol=1e-5, atol=1e-6)
    scale = max(1.0, *(gradient.abs().max().item() for gradient in expected.values()))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=3e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


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
