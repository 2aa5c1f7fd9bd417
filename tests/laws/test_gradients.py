"""Training: gradients with respect to the gates are right through the whole model, and every selector parameter gets one."""

from __future__ import annotations

import pytest
import torch
from cases import ESTIMATORS, PLACES, SCORERS, Case, cases, hard, has_loss, train_loss

import hf_hardattn

CASES = cases(SCORERS, ESTIMATORS, (1, 0.5, "threshold:0.5", "top_p:0.6", 1.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_selector_parameter_gets_a_gradient(case):
    """Distributed training waits for all of them, without ``find_unused_parameters``."""
    example = hard(case)
    if case.estimator == "distil" and not has_loss(example):
        return  # its lesson is added to the loss; without one it warns
    train_loss(example).backward()
    for name, parameter in example.model.named_parameters():
        if "selector" in name and parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "case", [c for c in cases(("linear", "mlp"), [e for e in ESTIMATORS if e != "soft"], (2, 0.5))], ids=str
)
def test_the_scorer_learns(case):
    example = hard(case, baseline="none")
    if case.estimator == "distil" and not has_loss(example):
        return
    train_loss(example).backward()
    gradients = [p.grad.abs().max() for n, p in example.model.named_parameters() if "selector.scorer.weight" in n]
    flat = case.estimator == "sparsemax"  # by design: scores further than the temperature from the border learn nothing
    if case.head not in ("ViTForImageClassification", "BlipForQuestionAnswering") and not flat:
        assert max(gradients) > 0


def gated_loss(example, gates):
    """The training loss as a function of the gates of its one site."""

    def put(module, args, selection):
        selection.gates = gates

    (selector,) = hf_hardattn.selectors(example.model).values()
    handle = selector.register_forward_hook(put)
    try:
        return train_loss(example)
    finally:
        handle.remove()


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p.architecture}-{p.group}-{p.causal}")
def test_gate_gradients_are_those_of_finite_differences(place):
    example = hard(Case(place, place.heads[0], "linear", "straight_through", 3))
    site = next(iter(hf_hardattn.selectors(example.model)))
    example = hard(Case(place, place.heads[0], "linear", "straight_through", 3), sites=[site])
    with (
        torch.no_grad()
    ):  # moderate attention: where a dropped position outscores the kept ones by far, the slope at 0 is past measuring
        for parameter in example.model.parameters():
            parameter.mul_(0.5)
    example.model.double()
    for name, value in example.batch.items():
        if torch.is_tensor(value) and value.is_floating_point():
            example.batch[name] = value.double()
    with hf_hardattn.record(example.model) as selections:
        train_loss(example)
    valid, mask = selections[0].valid, selections[0].mask
    # between 0 and 1, where the loss is smooth; then at the gates of the choice, where a dropped position asks to come back
    between = torch.where(valid, 0.2 + 0.6 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)), 0.0)
    for gates in (between, mask.float()):
        gates = gates.clone().requires_grad_()
        gradient = torch.autograd.grad(gated_loss(example, gates), gates)[0].flatten()
        largest = gradient.abs().max().item()
        places = (
            gradient.abs().argsort(descending=True)[:3].tolist()
            + (valid & ~mask).flatten().nonzero().flatten()[:2].tolist()
        )
        for n in places:
            slope = finite_difference(example, gates.detach(), n)
            assert abs(slope - gradient[n].item()) < 2e-2 * abs(slope) + 2e-2 * largest + 1e-3, (site, n)


def finite_difference(example, gates, n, step=1e-2):
    """The slope at one gate: central where it can move both ways, from above (to second order) at 0."""

    def at(offset):
        moved = gates.clone()
        moved.view(-1)[n] += offset
        with torch.no_grad():
            return gated_loss(example, moved).item()

    if gates.flatten()[n] > step:
        return (at(step) - at(-step)) / (2 * step)
    return (-3 * at(0.0) + 4 * at(step) - at(2 * step)) / (2 * step)
