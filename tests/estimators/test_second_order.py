"""Estimators through differences and rates, against their formulas: ReinMax and ReinMax-Rao, perturbed, I-MLE, hard concrete."""

from __future__ import annotations

import math

import pytest
import torch
from choosing import (
    build,
    choose,
    exact_gradient,
    largest_z,
    linear,
    quadratic,
    sampled_gradients,
)
from torch import Tensor

from hf_hardattn.estimators import Sampling


def jacobian(q: Tensor, v: Tensor) -> Tensor:
    """``(diag(q) - q q^T) v``."""
    return q * (v - (q * v).sum(-1, keepdim=True))


# ---------------------------------------------------------------- ReinMax


@pytest.mark.parametrize(("n", "k"), [(5, 1), (6, 2), (6, 3), (6, 5)])
def test_reinmax_is_exact_for_a_quadratic_loss(n: int, k: int) -> None:
    """100 000 draws, every component within 4.5 standard errors; SIMPLE is more than 30 away."""
    torch.manual_seed(n + k)
    scores = torch.randn(n)
    exact = exact_gradient(scores, k, "conditional_bernoulli", quadratic)
    assert largest_z(sampled_gradients("reinmax", {}, scores, k, quadratic, 100_000), exact) < 4.5
    assert largest_z(sampled_gradients("simple", {}, scores, k, quadratic, 100_000), exact) > 30


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.7])
def test_reinmax_with_one_position_is_the_published_one(tau: float) -> None:
    """``2 J(pi1) v - J(p) v / 2``, ``pi1 = (softmax(s / tau) + z) / 2``, draw by draw; tau below 1 counts as 1."""
    torch.manual_seed(0)
    scores, v = torch.randn(50, 6, requires_grad=True), torch.randn(50, 6)
    choice = choose("reinmax", {}, scores, 1, temperature=0.8, backward_temperature=0.8 * tau)
    found = torch.autograd.grad((choice.gates * v).sum(), scores)[0]

    theta = scores.detach() / 0.8
    pi = ((theta / max(tau, 1.0)).softmax(-1) + choice.mask.float()) / 2
    wanted = (2 * jacobian(pi, v) - 0.5 * jacobian(theta.softmax(-1), v)) / 0.8
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- ReinMax-Rao


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_reinmax_rao_is_the_published_one(temperature: float) -> None:
    """``2 E[J(y) v / tau | z] - J(p) v / 2``, the expectation by rejection: Gumbel noise at ``log pi`` whose largest is z.

    Each z by itself, every component within 4.5 standard errors of the two means; and the variance given z falls with the draws.
    """
    torch.manual_seed(0)
    scores, v, tau, count = torch.randn(4), torch.randn(4), 0.7, 40_000
    p = (scores / temperature).softmax(-1)
    gradients = {}
    for draws in (1, 8):
        rows = scores.repeat(count, 1).requires_grad_()
        choice = choose("reinmax_rao", {"draws": draws, "tau": tau}, rows, 1, temperature=temperature)
        gradients[draws] = choice.mask, torch.autograd.grad((choice.gates * v).sum(), rows)[0].double()
    for z in range(4):
        log_pi = ((p + torch.nn.functional.one_hot(torch.tensor(z), 4)) / 2).log()
        noisy = log_pi - torch.log(-torch.log(torch.rand(20 * count, 4).clamp(1e-7)))
        y = (noisy[noisy.argmax(-1) == z] / tau).softmax(-1)
        wanted = (2 * jacobian(y, v) / tau - 0.5 * jacobian(p, v)) / temperature
        spread = []
        for mask, gradient in gradients.values():
            found = gradient[mask[:, z]]
            error = (found.var(0) / len(found) + wanted.var(0) / len(wanted)).sqrt()
            assert ((found.mean(0) - wanted.mean(0)).abs() / error).max() < 4.5
            spread.append(found.var(0))
        assert (spread[1] < spread[0] / 4).all()


def test_reinmax_rao_with_more_positions_is_reinmax() -> None:
    """In a batch of both kinds of row: the same sample and, for k = 2, the same gradient bit for bit; for k = 1 another."""
    scores, weight, results = torch.randn(40, 6, requires_grad=True), torch.randn(40, 6), []
    k = torch.tensor([1, 2]).repeat(20)
    for name in ("reinmax", "reinmax_rao"):
        torch.manual_seed(1)
        choice = choose(name, {}, scores, k)
        results.append((choice.mask, torch.autograd.grad((choice.gates * weight).sum(), scores)[0]))
    (mask, gradient), (rao_mask, rao_gradient) = results
    assert torch.equal(mask, rao_mask) and torch.equal(gradient[1::2], rao_gradient[1::2])
    assert ((gradient[::2] - rao_gradient[::2]).abs().amax(-1) > 1e-4).all()


def test_reinmax_rao_is_biased_where_reinmax_is_exact() -> None:
    """A linear loss: ReinMax's mean is the exact gradient, ReinMax-Rao's is shorter, in nearly the same direction."""
    torch.manual_seed(0)
    scores = torch.randn(6)
    exact = exact_gradient(scores, 1, "conditional_bernoulli", linear)
    assert largest_z(sampled_gradients("reinmax", {}, scores, 1, linear, 40_000), exact) < 4.5
    mean = sampled_gradients("reinmax_rao", {"draws": 8}, scores, 1, linear, 40_000).mean(0)
    size = (mean @ exact / exact.square().sum()).item()
    assert 0.6 < size < 0.9 and torch.cosine_similarity(mean, exact, dim=0) > 0.97


# ---------------------------------------------------------------- perturbed top-k


def test_perturbed_of_two_positions_has_a_closed_form() -> None:
    """``P(first is kept) = Phi((s_1 - s_2) / (sigma sqrt 2))``: value and derivative within 5 standard errors at 400 000 draws."""
    scores = torch.tensor([[0.3, -0.4]], requires_grad=True)
    torch.manual_seed(0)
    choice = choose("perturbed", {"draws": 400_000, "sigma": 0.6, "hard": False}, scores, 1, temperature=1.5)
    scale = 0.6 * 1.5 * math.sqrt(2)
    law = torch.distributions.Normal(0.0, scale)
    assert abs(choice.gates[0, 0] - law.cdf(torch.tensor(0.7))) < 5 * 0.5 / math.sqrt(400_000)
    slope = law.log_prob(torch.tensor(0.7)).exp()
    gradient = torch.autograd.grad(choice.gates[0, 0], scores)[0][0]
    assert (gradient - torch.stack([slope, -slope])).abs().max() < 5 / 0.9 / math.sqrt(400_000)


def test_perturbed_gradient_is_that_of_the_smoothed_map() -> None:
    """The Jacobian at 400 000 draws against central differences of the smoothed map with the same noise."""
    scores = torch.tensor([[0.6, -0.3, 0.1, 1.1, -1.0]], requires_grad=True)
    options, h = {"draws": 400_000, "sigma": 0.8, "hard": False}, 0.1

    def smoothed(at: Tensor) -> Tensor:
        torch.manual_seed(1)
        return choose("perturbed", options, at, 2).gates[0]

    value, hard = smoothed(scores), choose("perturbed", {**options, "hard": True, "draws": 10}, scores, 2)
    assert hard.gates.tolist() == hard.mask.tolist() == [[True, False, False, True, False]]
    jacobian = torch.stack([torch.autograd.grad(gate, scores, retain_graph=True)[0][0] for gate in value])
    steps = h * torch.eye(5).unsqueeze(1)
    differences = torch.stack([(smoothed(scores + d) - smoothed(scores - d)) / (2 * h) for d in steps], 1)
    assert (jacobian - differences).abs().max() < 0.01 and jacobian.abs().max() > 0.2


# ---------------------------------------------------------------- I-MLE


def test_imle_is_a_difference_of_choices() -> None:
    """Against a loop: the top k of the noisy scores, before and after the step."""
    scores, weight = torch.randn(4, 6, requires_grad=True), 3 * torch.randn(4, 6)
    options = {"adaptive": False, "strength": 0.7}
    torch.manual_seed(1)
    choice = choose("imle", options, scores, 2, temperature=0.5, backward_temperature=2.0)
    gradient = torch.autograd.grad((choice.gates * weight).sum(), scores)[0]
    torch.manual_seed(1)
    noisy, step = scores.detach() - 0.5 * torch.log(-torch.log(torch.rand(4, 6))), 0.7 * 2.0
    for row in range(4):
        before, after = (set(w.topk(2).indices.tolist()) for w in (noisy[row], noisy[row] - step * weight[row]))
        assert set(choice.mask[row].nonzero().flatten().tolist()) == before
        wanted = [((i in before) - (i in after)) / step for i in range(6)]
        torch.testing.assert_close(gradient[row], torch.tensor(wanted))
    assert (gradient != 0).any()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_sum_of_gamma_has_its_moments(k: int) -> None:
    """Mean ``(H_10 - log 10) / k``, variance ``sum 1 / i^2 / k``, within 5 standard errors of 200 000 draws."""
    from hf_hardattn.estimators.imle import sum_of_gamma

    torch.manual_seed(k)
    noise = sum_of_gamma(torch.tensor([[k]]), (200_000, 1), Sampling(uniform=torch.rand)).double()
    harmonic, squares = (sum(i**-p for i in range(1, 11)) for p in (1, 2))
    error = noise.std() / math.sqrt(200_000)
    assert abs(noise.mean() - (harmonic - math.log(10)) / k) < 5 * error
    spread = (noise - noise.mean()) ** 2
    assert abs(spread.mean() - squares / k) < 5 * spread.std() / math.sqrt(200_000)


def test_imle_finds_its_step_whatever_the_scale_of_the_loss() -> None:
    """One nonzero entry a row on average, for losses 1e-6 and 1e6 times as large; the state is not the model's."""
    found = []
    for scale in (1e-6, 1e6):
        torch.manual_seed(0)
        estimator, weight = build("imle"), scale * torch.randn(64, 8)
        assert estimator.state is None and not estimator.state_dict()
        for _ in range(400):
            scores = torch.randn(64, 8, requires_grad=True)
            choice = choose(estimator, {}, scores, 3)
            gradient = torch.autograd.grad((choice.gates * weight).sum(), scores)[0]
        assert not estimator.state_dict() and 0.8 < estimator.state[1] < 1.2
        found.append((estimator.state, gradient / gradient.norm()))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    state = estimator.state
    choose(estimator, {}, torch.randn(4, 8), 3, training=False)
    scores = torch.randn(4, 8, requires_grad=True)
    choose(estimator, {}, scores, 8).gates.sum().backward()  # no row has a choice
    assert torch.equal(estimator.state, state)


# ---------------------------------------------------------------- hard concrete


def test_hard_concrete_expects_what_it_keeps() -> None:
    """The closed form of E[L0], read off the penalty at multiplier 1, against 200 000 draws: within 4.5 standard errors."""
    torch.manual_seed(0)
    estimator = build("hard_concrete", {"stiffness": 0.0})
    estimator.multiplier.data.fill_(1.0)
    scores = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    choice = choose(estimator, {}, scores.expand(200_000, 5), 2, temperature=0.7)
    expected = choice.penalty[0].item() * 5 + 2
    # a row that would keep nothing keeps one: it adds its probability
    off = 1 - (scores / 0.7 + 2 / 3 * math.log(11)).sigmoid()
    kept = choice.mask.sum(-1).double()
    assert expected == pytest.approx((5 - off.sum()).item(), abs=1e-5)
    assert abs(kept.mean() - expected - off.prod()) < 4.5 * kept.std() / math.sqrt(200_000)
    assert ((choice.gates == 1).any() and ((choice.gates > 0) & (choice.gates < 1)).any()) and kept.min() == 1


@pytest.mark.parametrize(("start", "k"), [(1.0, 2), (-1.0, 6)])
def test_hard_concrete_multiplier_climbs_to_the_rate(start: float, k: int) -> None:
    """One optimizer for scores and multiplier, against a task that pulls the other way: within 0.05 of the rate."""
    torch.manual_seed(0)
    estimator, scores = build("hard_concrete"), torch.nn.Parameter(start + 0.1 * torch.randn(8))
    optimizer = torch.optim.Adam([scores, *estimator.parameters()], lr=0.02)
    worth, rates = 0.1 * start * torch.rand(8), []
    for step in range(800):
        choice = choose(estimator, {}, scores.expand(32, 8), k)
        optimizer.zero_grad()
        (choice.penalty.mean() - (worth * choice.gates).sum(-1).mean()).backward()
        optimizer.step()
        rates.append(choice.mask.float().mean().item())
        if step == 0:  # over the rate it grows, below it falls
            assert (estimator.multiplier * start > 0).all()
    assert abs(sum(rates[-200:]) / 200 - k / 8) < 0.05
    estimator.reset_parameters()
    assert estimator.multiplier.tolist() == [0.0]
