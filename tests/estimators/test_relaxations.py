"""Estimators through a smooth stand-in, against their formulas: straight-through, Gumbel, entmax, log gate."""

from __future__ import annotations

import math

import pytest
import torch
from choosing import (
    choose,
    curved,
    mixed_rows,
    sampled_gradients,
)
from torch import Tensor

from hf_hardattn.distributions import PlackettLuce
from hf_hardattn.estimators._relaxation import noisy_given_order
from hf_hardattn.functional.topk import topk_mask

# ---------------------------------------------------------------- surrogates and relaxation


def test_straight_through_surrogates() -> None:
    """Backward of each surrogate against its formula."""
    torch.manual_seed(0)
    scores, weight = torch.randn(6, requires_grad=True), torch.randn(6)
    middle = scores.detach().sort(descending=True).values[1:3].mean()
    formulas = {
        "sigmoid": lambda s: torch.sigmoid((s - middle) / 0.5),
        "softmax": lambda s: 2 * torch.softmax(s / 0.5, -1),
        "identity": lambda s: s,
    }
    for surrogate, formula in formulas.items():
        choice = choose("straight_through", {"surrogate": surrogate}, scores, 2, temperature=0.5)
        wanted = torch.autograd.grad((formula(scores) * weight).sum(), scores)[0]
        torch.testing.assert_close(torch.autograd.grad((choice.gates * weight).sum(), scores)[0], wanted)


def test_balanced_straight_through_has_the_slope_of_gates_that_sum_to_k() -> None:
    """``sigmoid((s - c(s)) / T)`` with c solved for by bisection, against finite differences, where c is the midpoint."""
    scores = torch.tensor([2.0, 1.0, 0.4, -0.4, -1.0, -2.0], dtype=torch.float64)  # symmetric: c = 0 at k = 3
    weight = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.7, 1.0], dtype=torch.float64)

    def loss(moved: Tensor) -> Tensor:
        low, high = torch.tensor(-10.0).double(), torch.tensor(10.0).double()
        for _ in range(60):
            middle = (low + high) / 2
            enough = torch.sigmoid((moved - middle) / 0.5).sum() >= 3
            low, high = (middle, high) if enough else (low, middle)
        return (torch.sigmoid((moved - low) / 0.5) * weight).sum()

    rows = scores.float().requires_grad_()
    choice = choose("straight_through", {"surrogate": "balanced"}, rows, 3, temperature=0.5)
    found = torch.autograd.grad((choice.gates * weight.float()).sum(), rows)[0]
    for n in range(6):
        step = torch.zeros_like(scores).index_fill(0, torch.tensor(n), 1e-5)
        slope = (loss(scores + step) - loss(scores - step)) / 2e-5
        assert abs(found[n].item() - slope.item()) < 1e-4


def relax_by_loop(noisy: Tensor, k: int, temperature: float) -> Tensor:
    """The k rounds of Xie & Ermon, as written in the docstring."""
    khot = torch.zeros_like(noisy)
    for _ in range(k):
        share = (noisy / temperature).softmax(-1)
        khot = khot + share
        noisy = noisy + torch.log(1 - share)
    return khot


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gumbel_relaxation_equals_the_algorithm(temperature: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 6, requires_grad=True)
    k = torch.tensor([1, 2, 3, 5])
    torch.manual_seed(1)
    choice = choose("gumbel", {"hard": False}, scores, k, temperature=temperature)
    torch.manual_seed(1)
    uniform, weight = torch.rand(4, 6).double(), torch.randn(4, 6).double()
    noisy = scores.double() - torch.log(-torch.log(uniform))
    wanted = torch.stack([relax_by_loop(row, int(count), temperature) for row, count in zip(noisy, k, strict=True)])
    torch.testing.assert_close(choice.gates.double(), wanted, atol=2e-5, rtol=1e-4)
    gradient = torch.autograd.grad((choice.gates * weight).sum(), scores, retain_graph=True)[0]
    exact = torch.autograd.grad((wanted * weight).sum(), scores)[0]
    torch.testing.assert_close(gradient, exact, atol=2e-4, rtol=2e-3)


def test_gumbel_relaxation_becomes_the_sample() -> None:
    """At a low temperature, and with leads of hundreds, no position is taken twice."""
    torch.manual_seed(0)
    scores = torch.tensor([[300.0, 0.0, -1.0, 100.0, -200.0]]).repeat(20, 1)
    for k in range(1, 5):
        choice = choose("gumbel", {"hard": False}, scores, k, temperature=0.01)
        torch.testing.assert_close(choice.gates, choice.mask.float(), atol=0.05, rtol=0)


def test_gumbel_hard_and_relaxed_share_sample_and_gradient() -> None:
    scores, weight, results = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), []
    for hard in (True, False):
        torch.manual_seed(2)
        choice = choose("gumbel", {"hard": hard}, scores, 3)
        results.append((choice.mask, torch.autograd.grad((choice.gates * weight).sum(), scores)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


# ---------------------------------------------------------------- decoupled Gumbel


def test_decoupled_gumbel_of_one_position() -> None:
    """``z = argmax(s / T_f + G)``, gradient ``J(softmax(s / T_b + G)) v / T_b``, draw by draw with the same noise."""
    scores, v = torch.randn(50, 6, requires_grad=True), torch.randn(50, 6)
    torch.manual_seed(1)
    choice = choose("gumbel_decoupled", {}, scores, 1, temperature=0.5, backward_temperature=2.0)
    torch.manual_seed(1)
    noise = -torch.log(-torch.log(torch.rand(50, 6)))
    assert torch.equal(choice.mask.long().argmax(-1), (scores / 0.5 + noise).argmax(-1))
    y = (scores / 2.0 + noise).softmax(-1)
    wanted = torch.autograd.grad((y * v).sum(), scores)[0]
    torch.testing.assert_close(torch.autograd.grad((choice.gates * v).sum(), scores)[0], wanted)


def test_decoupled_gumbel_samples_at_the_forward_temperature() -> None:
    """100 000 draws of one position: frequencies within 4.5 standard errors of ``softmax(s / T_f)``, whatever T_b is."""
    torch.manual_seed(0)
    scores = torch.tensor([1.0, 0.2, -0.5, -2.0])
    for forward, backward in ((0.5, 2.0), (2.0, 0.5)):
        choice = choose(
            "gumbel_decoupled", {}, scores.expand(100_000, 4), 1, temperature=forward, backward_temperature=backward
        )
        p = (scores / forward).softmax(-1)
        assert ((choice.mask.float().mean(0) - p).abs() / (p * (1 - p) / 100_000).sqrt()).max() < 4.5


@pytest.mark.parametrize("k", [1, 3])
def test_decoupled_gumbel_is_gumbel_at_temperatures_of_one(k: int) -> None:
    scores, v, results = torch.randn(20, 6, requires_grad=True), torch.randn(20, 6), []
    for name in ("gumbel", "gumbel_decoupled"):
        torch.manual_seed(1)
        choice = choose(name, {}, scores, k)
        results.append((choice.mask, torch.autograd.grad((choice.gates * v).sum(), scores)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_simple_without_sampling_keeps_the_top_k() -> None:
    scores, k, valid = mixed_rows()
    assert torch.equal(choose("simple", {"sample": False}, scores, k, valid).mask, topk_mask(scores, k, valid))


# ---------------------------------------------------------------- Gumbel-Rao


@pytest.mark.parametrize("draws", [1, 10])
@pytest.mark.parametrize("k", [1, 3])
def test_gumbel_rao_has_the_mean_of_gumbel_and_less_variance(k: int, draws: int) -> None:
    """60 000 gradients each: every component of the means within 4.5 standard errors; at 10 draws every variance is lower."""
    torch.manual_seed(k)
    scores = torch.randn(6)
    rao = sampled_gradients("gumbel_rao", {"draws": draws}, scores, k, curved, 60_000, temperature=0.7)
    plain = sampled_gradients("gumbel", {}, scores, k, curved, 60_000, temperature=0.7)
    error = ((rao.var(0) + plain.var(0)) / 60_000).sqrt()
    assert ((rao.mean(0) - plain.mean(0)).abs() / error).max() < 4.5
    if draws == 10:
        assert (rao.var(0) < plain.var(0)).all()


def test_conditional_noise_has_the_law_of_the_noise() -> None:
    """Draw an order, then the noisy scores given it: together they are the noisy scores. 50 000 rows, Kolmogorov-Smirnov
    at p = 0.001 for every score, every difference and the largest; and each draw has the order it was given."""
    torch.manual_seed(0)
    n, k, rows = 5, 3, 50_000
    scores, valid = torch.randn(n).expand(rows, n), torch.arange(n) != 3
    law = PlackettLuce(scores, torch.tensor(k), valid, k)
    order = law.outcome(torch.rand(rows, n))
    noisy = noisy_given_order(law, order, torch.rand(2, rows, n))
    assert torch.equal(noisy.masked_fill(~valid, -1e30).topk(k).indices, order.expand(2, rows, k))

    def distance(values: Tensor, cdf: Tensor) -> float:
        order = values.argsort()
        steps = torch.arange(1, rows + 1) / rows
        return (cdf[order] - steps).abs().max().item()

    limit, w, s = 1.95 / math.sqrt(rows), noisy[1], scores[0]
    for i in (0, 1, 2, 4):
        assert distance(w[:, i], torch.exp(-torch.exp(s[i] - w[:, i]))) < limit
        for j in range(i):
            if j != 3:
                assert distance(w[:, i] - w[:, j], torch.sigmoid(w[:, i] - w[:, j] - s[i] + s[j])) < limit
    top = w[:, valid].amax(-1)
    assert distance(top, torch.exp(-torch.exp(s[valid].logsumexp(0) - top))) < limit


# ---------------------------------------------------------------- entmax and sparsemax


def test_entmax_readme_values() -> None:
    """The examples of the entmax package's README, k = 1 and 2."""
    scores = torch.tensor([[-2.0, 0.0, 0.5]])
    for name, options, k, wanted in (
        ("sparsemax", {}, 1, [0.0, 0.25, 0.75]),
        ("entmax", {}, 1, [0.0, 0.3260, 0.6740]),
        ("sparsemax", {}, 2, [0.0, 1.0, 1.0]),
        ("entmax", {"alpha": 2.0}, 1, [0.0, 0.25, 0.75]),
        ("entmax", {"alpha": 1.001}, 1, [0.0486, 0.3592, 0.5922]),
    ):
        gates = choose(name, {**options, "hard": False}, scores, k).gates[0]
        torch.testing.assert_close(
            gates, torch.tensor(wanted), atol=1e-4 if options.get("alpha") != 1.001 else 2e-3, rtol=0
        )


def test_entmax_agrees_with_the_package() -> None:
    """alpha = 1.5 at k = 1, alpha = 2 at any k: values and gradients."""
    import entmax

    torch.manual_seed(0)
    scores, weight = torch.randn(20, 9, requires_grad=True), torch.randn(20, 9)
    pairs = [("entmax", {"alpha": 1.5}, 1, entmax.entmax15(scores / 0.5))]
    for k in (1, 2, 4, 8):
        other = entmax.budget_bisect(scores / 0.5, k)
        pairs += [("sparsemax", {}, k, other), ("entmax", {"alpha": 2.0}, k, other)]
    for name, options, k, other in pairs:
        gates = choose(name, {**options, "hard": False}, scores, k, temperature=0.5).gates
        torch.testing.assert_close(gates, other, atol=2e-6, rtol=1e-5)
        found, wanted = (torch.autograd.grad((p * weight).sum(), scores, retain_graph=True)[0] for p in (gates, other))
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9])
def test_capped_entmax_solves_its_problem(alpha: float) -> None:
    """Optimality in float64: on 0 < p < 1 the derivative of the objective is one number, above it at p = 1, below at 0; and
    the gradient against central differences."""
    torch.manual_seed(0)
    scores, weight = 2 * torch.randn(12, 7, dtype=torch.float64), torch.randn(12, 7, dtype=torch.float64)

    def gates(at: Tensor) -> Tensor:
        return choose("entmax", {"alpha": alpha, "hard": False}, at, 3).gates

    p = gates(scores)
    torch.testing.assert_close(p.sum(-1), torch.full((12,), 3.0, dtype=torch.float64), atol=1e-6, rtol=0)
    slope = scores - p ** (alpha - 1) / (alpha - 1)
    for row, at in zip(slope, p, strict=True):
        inner = row[(at > 0) & (at < 1)]
        if len(inner):
            assert inner.max() - inner.min() < 1e-5
            assert (row[at == 1] > inner.min() - 1e-5).all() and (row[at == 0] < inner.max() + 1e-5).all()
    leaf = scores.clone().requires_grad_()
    found = torch.autograd.grad((gates(leaf) * weight).sum(), leaf)[0]
    for i in range(7):
        step = 1e-4 * torch.eye(7, dtype=torch.float64)[i]
        difference = ((gates(scores + step) - gates(scores - step)) * weight).sum(-1) / 2e-4
        torch.testing.assert_close(found[:, i], difference, atol=2e-3, rtol=1e-2)


# ---------------------------------------------------------------- log gate


def test_log_gate_is_added_to_the_logits() -> None:
    """Its gradient through gated attention is that of ``softmax(logits + log g)`` over the kept, at g = 1 or at g."""
    from hf_hardattn.functional.attention import gated_attend

    torch.manual_seed(0)
    scores, weight = torch.randn(1, 1, 2, 6, requires_grad=True), torch.randn(1, 1, 2, 4)
    query, key, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    for hard in (True, False):
        choice = choose("log_gate", {"hard": hard}, scores, 3, temperature=0.5)
        output, _ = gated_attend(query, key, value, choice.gates, scale=0.5)
        log_gate = (scores / 0.5).masked_fill(~choice.mask, -1e30)
        log_gate = log_gate - log_gate.detach() if hard else log_gate
        logits = (query @ key.transpose(-1, -2) * 0.5).masked_fill(~choice.mask, -1e30)
        wanted = (logits + log_gate).softmax(-1) @ value
        torch.testing.assert_close(output, wanted)
        gradients = [torch.autograd.grad((o * weight).sum(), scores, retain_graph=True)[0] for o in (output, wanted)]
        torch.testing.assert_close(*gradients)
