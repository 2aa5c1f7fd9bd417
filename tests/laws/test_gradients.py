"""Training: gradients with respect to the gates are right through the whole model, and every selector parameter gets one."""

from __future__ import annotations

import pytest
import torch
from cases import ESTIMATORS, SCORERS, Case, cases, hard, has_loss, head_places, train_loss

import hf_hardattn
from hf_hardattn.selector import Selector

CASES = cases(SCORERS, ESTIMATORS, (1, 0.5, "threshold:0.5", "top_p:0.6", 1.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_selector_parameter_gets_a_gradient(case):
    """Distributed training waits for all of them, without ``find_unused_parameters``."""
    example = hard(case)
    train_loss(example).backward()
    for name, parameter in example.model.named_parameters():
        if "selector" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("case", [c for c in cases(("linear", "mlp"), [e for e in ESTIMATORS if e != "soft"], (2, 0.5))], ids=str)
def test_the_scorer_learns(case):
    example = hard(case, baseline="none")
    train_loss(example).backward()
    gradients = [p.grad.abs().max() for n, p in example.model.named_parameters() if "selector.scorer.weight" in n]
    if not (case.head in ("ViTForImageClassification", "BlipForQuestionAnswering")):
        assert max(gradients) > 0


def gated_loss(example, gates, sites):
    """The training loss as a function of the gates of some sites."""
    handles = []

    def put(module, args, selection):
        selection.gates = gates[module.site].view_as(selection.gates)

    for module in example.model.modules():
        if isinstance(module, Selector) and module.site in sites:
            handles.append(module.register_forward_hook(put))
    try:
        return train_loss(example)
    finally:
        for handle in handles:
            handle.remove()


PATHS = [(head, place) for head, place in head_places()]


@pytest.mark.parametrize(("head", "place"), PATHS)
def test_gate_gradients_are_those_of_finite_differences(head, place):
    example = hard(Case(place, head, "linear", "straight_through", 3))
    example.model.double()
    for name, value in example.batch.items():
        if torch.is_tensor(value) and value.is_floating_point():
            example.batch[name] = value.double()
    with hf_hardattn.record(example.model) as selections:
        train_loss(example)
    # one site, its gates away from 0 and 1, where the loss is smooth; then at 0, where a dropped position asks to come back
    site = selections[0].site
    torch.manual_seed(2)
    middle = torch.rand_like(selections[0].gates) * 0.6 + 0.2
    middle = torch.where(selections[0].valid, middle, 0.0)
    for gates in (middle, torch.where(selections[0].mask, 1.0, 0.0)):
        gates = gates.detach().clone().requires_grad_()
        gradient = torch.autograd.grad(gated_loss(example, {site: gates}, {site}), gates)[0].flatten()
        places = gradient.abs().argsort(descending=True)[:3].tolist()
        others = (selections[0].valid & ~selections[0].mask).flatten().nonzero().flatten()[:2].tolist()
        for n in places + others:
            if not selections[0].valid.flatten()[n]:
                continue
            values = []
            for step in STEPS_UP if gates.flatten()[n] < 0.1 else STEPS_BOTH:
                moved = gates.detach().clone()
                moved.view(-1)[n] += step
                with torch.no_grad():
                    values.append(gated_loss(example, {site: moved}, {site}).item())
            slope = differences(values, gates.flatten()[n] < 0.1)
            assert abs(slope - gradient[n].item()) < 2e-2 * max(abs(slope), 0.05 * gradient.abs().max().item(), 1e-2), (site, n)


H = 4e-3
STEPS_BOTH, STEPS_UP = (-H, H), (H, 2 * H, 3 * H)


def differences(values, upward):
    """Central differences; at 0, where a gate just above counts as present, extrapolate from above."""
    if not upward:
        return (values[1] - values[0]) / (2 * H)
    first, second = (values[1] - values[0]) / H, (values[2] - values[1]) / H
    return first + 1.5 * (first - second)
