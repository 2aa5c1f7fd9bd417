"""Mean gradients against exact enumeration, and the published values of the k-subset toy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import pytest
import torch
from choosing import (
    GATED,
    HARD,
    LEARNING,
    build,
    carrier,
    choose,
    curved,
    exact_gradient,
    largest_z,
    linear,
    sampled_gradients,
    variants,
)
from torch import Tensor

from hf_hardattn import registry
from hf_hardattn.distributions import ConditionalBernoulli
from hf_hardattn.training.estimator_toys import SEEDS


@pytest.mark.parametrize("law", ["plackett_luce", "conditional_bernoulli"])
@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 3), (5, 1)])
def test_reinforce_is_unbiased(law: str, n: int, k: int) -> None:
    """200 000 draws; every component within 4.5 standard errors (fixed seed)."""
    torch.manual_seed(n * k)
    scores = torch.randn(n)
    gradients = sampled_gradients("reinforce", {"law": law}, scores, k, curved, 200_000)
    assert largest_z(gradients, exact_gradient(scores, k, law, curved)) < 4.5


@pytest.mark.parametrize(
    ("name", "options"),
    variants("reinforce", "rloo", "sfess", "grpo", "simple", "reinmax", "reinmax_rao", "gumbel_decoupled"),
)
def test_temperature_divides_the_scores_of_the_law(name: str, options: dict[str, Any]) -> None:
    scores, results = torch.randn(3, 6, requires_grad=True), []
    for temperature, given in ((0.5, scores), (1.0, scores / 0.5)):
        torch.manual_seed(1)
        choice = choose(name, options, given, 2, temperature=temperature)
        value = carrier(choice) * (1 if choice.gates is None else torch.arange(6))
        results.append((choice.mask, value, torch.autograd.grad(value.sum(), scores)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("n", "k"), [(5, 1), (6, 3), (6, 5)])
@pytest.mark.parametrize("sample", [True, False])
def test_simple_is_exact_for_a_linear_loss(n: int, k: int, sample: bool) -> None:
    """Every single estimate, not only their mean."""
    torch.manual_seed(n + k)
    scores = torch.randn(n)
    gradients = sampled_gradients("simple", {"sample": sample}, scores, k, linear, 20)
    exact = exact_gradient(scores, k, "conditional_bernoulli", linear)
    torch.testing.assert_close(gradients, exact.expand(20, n), atol=2e-6, rtol=1e-5)


def law_of(name: str, options: dict[str, Any]) -> str:
    """The law that a variant draws from, or comes near."""
    ordered = ("gumbel", "gumbel_decoupled", "gumbel_rao", "imle", "perturbed", "rloo")
    orders = name in ordered and options.get("noise") != "sum_of_gamma"
    return options.get("law", "plackett_luce" if orders else "conditional_bernoulli")


@pytest.mark.parametrize(("name", "options"), LEARNING)
def test_declared_bias_is_the_measured_one(name: str, options: dict[str, Any]) -> None:
    """On a curved loss: within 4.5 standard errors of the exact gradient if unbiased, more than 8 away if biased."""
    torch.manual_seed(7)
    scores, law = torch.randn(6), law_of(name, options)
    if name == "perturbed":
        options = {**options, "draws": 10}
    biased = registry.load("estimators", name).biased
    gradients = sampled_gradients(name, options, scores, 3, curved, 40_000 if biased else 100_000)
    z = largest_z(gradients, exact_gradient(scores, 3, law, curved))
    assert z > 8 if biased else z < 4.5


@pytest.mark.parametrize("law", ["plackett_luce", "conditional_bernoulli"])
@pytest.mark.parametrize("samples", [2, 3])
def test_grpo_has_the_mean_of_all_groups(samples: int, law: str) -> None:
    """``sum over groups p(S_1) ... p(S_K) 1/K sum_i A_i grad log p(S_i)`` by enumeration, A from its formula in float64.

    100 000 groups, every component within 4.5 standard errors. The mean is no multiple of the exact gradient, but points its way.
    """
    torch.manual_seed(3)
    scores, k = torch.randn(5), 2
    leaf = scores.double().requires_grad_()
    if law == "conditional_bernoulli":
        chosen = list(itertools.combinations(range(5), k))
        log_p = torch.stack([leaf[list(c)].sum() for c in chosen]).log_softmax(0)
    else:
        chosen = list(itertools.permutations(range(5), k))
        rest = [leaf.logsumexp(0), *(leaf[[j for j in range(5) if j != i]].logsumexp(0) for i in range(5))]
        log_p = torch.stack([leaf[i] - rest[0] + leaf[j] - rest[1 + i] for i, j in chosen])
    masks = torch.zeros(len(chosen), 5, dtype=torch.float64)
    for row, places in enumerate(chosen):
        masks[row, list(places)] = 1.0
    slopes = torch.stack([torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in log_p])
    groups = torch.tensor(list(itertools.product(range(len(chosen)), repeat=samples)))
    rewards = curved(masks)[groups]
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, correction=0, keepdim=True) + 1e-4)
    p = log_p.detach().exp()[groups].prod(-1)
    wanted = (p[:, None, None] * advantages[..., None] * slopes[groups]).mean(1).sum(0)
    gradients = sampled_gradients("grpo", {"samples": samples, "law": law}, scores, k, curved, 100_000)
    assert largest_z(gradients, wanted) < 4.5
    exact = exact_gradient(scores, k, law, curved)
    assert 0.9 < torch.cosine_similarity(wanted, exact, dim=0) < 0.9999


def test_grpo_counts_every_example_alike() -> None:
    """The same advantages at any scale and offset of the rewards; none where all samples are alike."""
    estimator, rewards = build("grpo"), torch.randn(4, 3)
    for i in range(4):
        others = torch.cat([rewards[:i], rewards[i + 1 :]])
        found = estimator.advantage(rewards[i], others)
        wanted = (rewards[i] - rewards.mean(0)) / rewards.std(0, correction=0)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            estimator.advantage(100 * rewards[i] + 7, 100 * others + 7), found, atol=1e-3, rtol=1e-3
        )
        assert torch.equal(estimator.advantage(torch.ones(3), torch.ones(3, 3)), torch.zeros(3))


@pytest.mark.parametrize("law", ["plackett_luce", "conditional_bernoulli"])
def test_exploration_is_unbiased_for_the_mixture(law: str) -> None:
    """The uniform part has no gradient: that of the mixture is 0.6 of the law's, in expectation."""
    torch.manual_seed(3)
    scores = torch.randn(5)
    gradients = sampled_gradients("reinforce", {"law": law}, scores, 2, curved, 200_000, exploration=0.4)
    assert largest_z(gradients, 0.6 * exact_gradient(scores, 2, law, curved)) < 4.5


@pytest.mark.parametrize(("name", "options"), GATED)
def test_exploration_keeps_uniform_positions_and_the_gradient(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    scores, weight = torch.linspace(-9, 9, 6).repeat(4000, 1).requires_grad_(), torch.randn(4000, 6)
    choice = choose(name, options, scores, 2, exploration=1.0)
    assert torch.equal(choice.gates, choice.mask.float()) and (choice.mask.sum(-1) == 2).all()
    assert (choice.mask.float().mean(0) - 1 / 3).abs().max() < 4.5 * math.sqrt(2 / 9 / 4000)
    torch.manual_seed(0)
    torch.randn(4000, 6)
    plain = choose(name, options, scores, 2)
    gradients = [torch.autograd.grad((c.gates * weight).sum(), scores)[0] for c in (choice, plain)]
    if not options.get("adaptive"):
        assert torch.equal(*gradients)


@pytest.mark.parametrize(("name", "options"), [v for v in HARD if v.values[0] != "variational"])
@pytest.mark.parametrize("kind", ["number", "rows"])
def test_backward_temperature_is_the_gradients_alone(name: str, options: dict[str, Any], kind: str) -> None:
    """Forward as without; backward, where nothing is sampled, as at that temperature. A tensor of rows does the same."""
    torch.manual_seed(0)
    scores, weight, results = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6), []
    backward = 2.0 if kind == "number" else torch.full((3, 1), 2.0)
    for how in ({"backward_temperature": backward}, {}, {"temperature": 2.0}):
        torch.manual_seed(1)
        choice = choose(name, options, scores, 3, **how)
        results.append((choice.mask, choice.gates, torch.autograd.grad((choice.gates * weight).sum(), scores)[0]))
    (mask, gates, gradient), (plain_mask, plain_gates, plain), (_, _, warm) = results
    assert torch.equal(mask, plain_mask) and torch.equal(gates, plain_gates)
    # one has no temperature, one finds its own step
    assert torch.equal(gradient, plain) is (options.get("surrogate") == "identity" or options.get("adaptive", False))
    if name in ("straight_through", "gumbel", "entmax", "sparsemax", "log_gate", "perturbed"):
        torch.testing.assert_close(gradient, warm)


# ---------------------------------------------------------------- published values


def toy(seed: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, ``[S, 10]`` masks, p(S) by the library's law, and f(S) = ||mask - b||^2."""
    random = numpy.random.RandomState(seed)
    scores = torch.tensor(random.randn(10), dtype=dtype).requires_grad_()
    b = torch.tensor(numpy.abs(random.randn(10)))
    masks = torch.zeros(math.comb(10, k), 10, dtype=torch.bool)
    for row, chosen in enumerate(itertools.combinations(range(10), k)):
        masks[row, list(chosen)] = True
    law = ConditionalBernoulli(scores.expand(len(masks), 10), torch.tensor(k), torch.ones(10, dtype=torch.bool), k)
    return scores, masks, law.log_prob(masks).exp(), ((masks.double() - b) ** 2).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_simple_paper_toy(seed: int, dtype: torch.dtype) -> None:
    scores, _, p, f = toy(seed, 5, dtype)
    mean = (p * f).sum()
    norm = torch.autograd.grad(mean, scores)[0].norm()
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    for value, published in zip((mean, f.min(), norm), SEEDS[seed], strict=True):
        assert value.item() == pytest.approx(published, abs=tolerance)


def test_simple_paper_toy_with_one_position() -> None:
    _, _, p, f = toy(1234, 1, torch.float64)
    assert (p * f).sum().item() == pytest.approx(11.286426, abs=1e-6)
    assert f.min().item() == pytest.approx(8.756282, abs=1e-6)
