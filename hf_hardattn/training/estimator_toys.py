"""Toy problems with exactly known gradients, on which the bias and the noise of each estimator are measured.

A toy consists of n scores, a number k of positions to keep and a loss f of the gates. The true gradient is ``d/ds sum_S p(S) f(S)``, by
enumeration in float64, under the distribution (law) that the estimator samples from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor

from .. import registry
from ..distributions import ConditionalBernoulli
from ..estimators import Choice, Estimator, Sampling

Loss = Callable[[Tensor], Tensor]  # gates [..., n] to [...]

LOSSES = ("quadratic", "attention", "attention, swapped", "tanh")
# The ten seeds of the SIMPLE paper's toy (UCLA-StarAI/SIMPLE, tractable_dist): E[f], min f and |grad| at k = 5.
SEEDS = {
    1234: (8.685266, 2.736191, 0.919681),
    1067: (6.124165, 1.578321, 0.974374),
    9198: (18.538078, 10.331406, 1.576983),
    9453: (4.290573, 1.032026, 0.540664),
    6240: (5.478800, 0.937338, 0.630166),
    7044: (9.866188, 4.509174, 1.144156),
    1755: (6.724844, 0.852461, 0.859373),
    7898: (9.726144, 4.073988, 1.011363),
    3131: (9.900890, 4.316833, 0.897899),
    1277: (3.943447, 1.200142, 0.598090),
}


@dataclass(frozen=True)
class Variant:
    """One way to estimate a gradient.

    Attributes:
        label: row in the tables.
        name, options, temperature, backward_temperature: settings of the estimator. The true gradient is that of a law at temperature 1.
        law: ``conditional_bernoulli`` or ``plackett_luce``: the law that it samples from or approximates.
        samples: draws per gradient of a score-function estimator. baseline: its baseline, ``none``, ``mean`` (the exact one), ``others``
            or ``group`` (as in GRPO, in standard deviations of the samples).
        warmup: backward passes before the measurement, for an estimator with state.
    """

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    law: str = "conditional_bernoulli"
    samples: int = 1
    baseline: str = "none"
    warmup: int = 0
    backward_temperature: float | None = None

    def build(self) -> Estimator:
        return registry.load("estimators", self.name)(**self.options)


ORDERS = "plackett_luce"
# Registered estimators that have no gradient of their own on a toy, and the reason.
LEFT_OUT = {
    "soft": "keeps everything",
    "distil": "learns from a teacher",
    "cropr": "learns from classes",
    "marginal": "is the enumeration",
    "variational": "without a target it is simple",
}
VARIANTS = (
    Variant("straight_through, balanced", "straight_through", {"surrogate": "balanced"}),
    Variant("straight_through, sigmoid", "straight_through", {"surrogate": "sigmoid"}),
    Variant("straight_through, softmax", "straight_through", {"surrogate": "softmax"}),
    Variant("straight_through, identity", "straight_through", {"surrogate": "identity"}),
    Variant("simple", "simple"),
    Variant("simple, top k", "simple", {"sample": False}),
    Variant("reinmax", "reinmax"),
    Variant("reinmax_rao, 32 draws", "reinmax_rao"),
    Variant("gumbel, T 0.5", "gumbel", temperature=0.5, law=ORDERS),
    Variant("gumbel, T 1", "gumbel", law=ORDERS),
    Variant("gumbel, relaxed, T 0.5", "gumbel", {"hard": False}, temperature=0.5, law=ORDERS),
    Variant("gumbel, relaxed, T 1", "gumbel", {"hard": False}, law=ORDERS),
    Variant("gumbel_decoupled, backward T 0.5", "gumbel_decoupled", law=ORDERS, backward_temperature=0.5),
    Variant("gumbel_decoupled, backward T 2", "gumbel_decoupled", law=ORDERS, backward_temperature=2.0),
    Variant("gumbel_rao, 10 draws, T 0.5", "gumbel_rao", temperature=0.5, law=ORDERS),
    Variant("gumbel_rao, 10 draws, T 1", "gumbel_rao", law=ORDERS),
    Variant("perturbed, 20 draws", "perturbed", {"draws": 20}),
    Variant("perturbed, 20 draws, relaxed", "perturbed", {"draws": 20, "hard": False}),
    Variant("imle, lambda 2.5", "imle", {"strength": 2.5, "adaptive": False}, law=ORDERS),
    Variant("imle, lambda 2.5, sum of gamma", "imle", {"strength": 2.5, "adaptive": False, "noise": "sum_of_gamma"}),
    Variant("imle, adaptive", "imle", law=ORDERS, warmup=150),
    Variant("hard_concrete", "hard_concrete"),
    Variant("entmax", "entmax"),
    Variant("entmax, relaxed", "entmax", {"hard": False}),
    Variant("sparsemax", "sparsemax"),
    Variant("sparsemax, relaxed", "sparsemax", {"hard": False}),
    Variant("log_gate", "log_gate"),
    Variant("log_gate, relaxed", "log_gate", {"hard": False}),
    Variant("reinforce, no baseline", "reinforce", {"law": "conditional_bernoulli"}),
    Variant("reinforce, exact mean", "reinforce", {"law": "conditional_bernoulli"}, baseline="mean"),
    Variant("reinforce, orders, no baseline", "reinforce", law=ORDERS),
    Variant("reinforce, orders, exact mean", "reinforce", law=ORDERS, baseline="mean"),
    *(Variant(f"sfess, K {k}", "sfess", samples=k, baseline="others") for k in (2, 4, 8)),
    *(Variant(f"rloo, K {k}", "rloo", law=ORDERS, samples=k, baseline="others") for k in (2, 4, 8)),
    *(Variant(f"grpo, K {k}", "grpo", law=ORDERS, samples=k, baseline="group") for k in (2, 4, 8)),
)


def all_variants() -> tuple[Variant, ...]:
    """Return ``VARIANTS`` and every other registered estimator with its defaults."""
    known = {variant.name for variant in VARIANTS} | set(LEFT_OUT)
    return VARIANTS + tuple(Variant(name, name) for name in registry.names("estimators") if name not in known)


# ---------------------------------------------------------------- the truth


@cache
def subsets(n: int, k: int) -> Tensor:
    """All k-subsets of n positions, fp64 ``[C(n, k), n]``."""
    masks = torch.zeros(math.comb(n, k), n, dtype=torch.float64)
    for row, chosen in enumerate(itertools.combinations(range(n), k)):
        masks[row, list(chosen)] = 1.0
    return masks


@cache
def orders(n: int, k: int) -> tuple[Tensor, Tensor]:
    """All ordered k-picks of n, int64 ``[P(n, k), k]``, and the row of ``subsets`` that each is a permutation of."""
    picks = torch.tensor(list(itertools.permutations(range(n), k)))
    row = {chosen: row for row, chosen in enumerate(itertools.combinations(range(n), k))}
    return picks, torch.tensor([row[tuple(sorted(pick))] for pick in picks.tolist()])


def probabilities(scores: Tensor, k: int, law: str) -> Tensor:
    """p(S) of every subset, fp64 ``[..., C(n, k)]``, with gradient to ``scores`` (fp64 ``[..., n]``)."""
    masks = subsets(scores.shape[-1], k)
    if law == "conditional_bernoulli":
        return (scores @ masks.T).softmax(-1)
    picks, rows = orders(scores.shape[-1], k)
    weights = scores.softmax(-1)[..., picks]
    remaining = 1 - (weights.cumsum(-1) - weights)  # probability of the positions that are not picked yet
    return scores.new_zeros(*scores.shape[:-1], len(masks)).index_add(-1, rows, (weights / remaining).prod(-1))


def expected(scores: Tensor, k: int, law: str, loss: Loss) -> Tensor:
    """``E[f]``, exact, fp64 ``[...]``, for scores fp64 ``[..., n]``."""
    return (probabilities(scores, k, law) * loss(subsets(scores.shape[-1], k))).sum(-1)


def truth(scores: Tensor, k: int, law: str, loss: Loss) -> tuple[Tensor, Tensor]:
    """``E[f]`` and its gradient, exact, fp64 ``[]`` and ``[n]``."""
    leaf = scores.detach().double().requires_grad_()
    mean = expected(leaf, k, law, loss)
    return mean.detach(), torch.autograd.grad(mean, leaf)[0]


# ---------------------------------------------------------------- estimates


def choose(
    estimator: Estimator, scores: Tensor, k: int, temperature: float = 1.0, backward_temperature: float | None = None
) -> Choice:
    """Let the estimator choose ``k`` positions of every row of ``scores`` (fp32 ``[..., n]``) as in training."""
    valid = torch.ones(scores.shape, dtype=torch.bool)
    sampling = Sampling(uniform=torch.rand, temperature=temperature, backward_temperature=backward_temperature)
    return estimator.choose(scores, torch.full(scores.shape[:-1], k), valid, slots=k, sampling=sampling)


def given(value: Tensor | None) -> Tensor:
    """Return ``value``, which must not be None.

    Raises:
        TypeError: the estimator does not have it.
    """
    if value is None:
        raise TypeError("an estimator with neither gates nor a log-probability belongs in LEFT_OUT.")
    return value


def advantages(rewards: Tensor, baseline: str, mean: Tensor) -> Tensor:
    """Rewards ``[..., K]`` minus their baseline; ``mean`` ``[...]`` is the exact mean."""
    if baseline == "group":
        spread = rewards.std(-1, correction=0, keepdim=True)
        return (rewards - rewards.mean(-1, keepdim=True)) / (spread + 1e-4)
    if baseline == "others":
        return rewards - (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - mean.unsqueeze(-1) if baseline == "mean" else rewards


def through_gates(variant: Variant, scores: Tensor, k: int, losses: dict[str, Loss], draws: int) -> dict[str, Tensor]:
    """One gradient per draw, fp64 ``[draws, n]``, for each loss, by backpropagation of ``f(gates)``."""
    found = {}
    for name, loss in losses.items():
        estimator = variant.build()
        for _ in range(variant.warmup):
            rows = scores.float().repeat(100, 1).requires_grad_()
            loss(
                given(choose(estimator, rows, k, variant.temperature, variant.backward_temperature).gates)
            ).sum().backward()
        rows = scores.float().repeat(draws, 1).requires_grad_()
        gates = given(choose(estimator, rows, k, variant.temperature, variant.backward_temperature).gates)
        found[name] = torch.autograd.grad(loss(gates).sum(), rows)[0].double()
    return found


@dataclass
class Draws:
    """Many draws from one law: masks and the gradients of their log-probabilities, fp64 ``[draws, K, n]``."""

    masks: Tensor
    scores: Tensor

    @classmethod
    def of(cls, variant: Variant, scores: Tensor, k: int, draws: int, samples: int) -> Draws:
        rows = scores.float().repeat(draws * samples, 1).requires_grad_()
        choice = choose(variant.build(), rows, k, variant.temperature, variant.backward_temperature)
        gradient = torch.autograd.grad(given(choice.log_prob).sum(), rows)[0]
        shape = (draws, samples, len(scores))
        return cls(choice.mask.double().view(shape), gradient.double().view(shape))

    def gradients(self, loss: Loss, variant: Variant, mean: Tensor) -> Tensor:
        """One score-function gradient per draw from ``variant.samples`` samples, fp64 ``[draws, n]``."""
        rewards = loss(self.masks[:, : variant.samples])
        weights = advantages(rewards, variant.baseline, mean)
        return (weights.unsqueeze(-1) * self.scores[:, : variant.samples]).mean(1)


def columns(gradients: Tensor, exact: Tensor) -> dict[str, float | None]:
    """Compute the columns of the tables from gradients ``[draws, n]``.

    Returns:
        ``bias``: 1 - cos(mean, exact), None if the mean is zero; ``error``: mean of 1 - cos(g, exact), where a zero gradient counts 1;
        ``sd``: root of the mean squared distance from the mean, divided by |exact|; ``size``: projection of the mean onto the exact
        gradient, relative to its length: 1 is correct, and below 0 a step increases the loss; ``z``: the largest deviation of the mean
        from the exact gradient, in standard errors.
    """
    mean, size = gradients.mean(0), exact.norm()
    cosines = torch.nn.functional.cosine_similarity(gradients, exact, dim=-1)
    spread = (gradients - mean).square()
    error = (spread.mean(0) / len(gradients)).sqrt()
    return {
        "bias": None if mean.norm() < 1e-6 * size else (1 - mean @ exact / (mean.norm() * size)).item(),
        "error": (1 - cosines).mean().item(),
        "sd": (spread.sum(-1).mean().sqrt() / size).item(),
        "size": (mean @ exact / size**2).item(),
        "z": ((mean - exact).abs() / (error + 1e-6)).max().item(),
    }


def measure(
    scores: Tensor, k: int, losses: dict[str, Loss], draws: int
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the ``columns`` of every variant on one toy, by loss and label."""
    found: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in losses}
    exact = {law: {n: truth(scores, k, law, f) for n, f in losses.items()} for law in ("conditional_bernoulli", ORDERS)}
    drawn: dict[str, Draws] = {}
    for variant in all_variants():
        if "gates" in registry.load("estimators", variant.name).needs:
            gradients = through_gates(variant, scores, k, losses, draws)
        else:
            if variant.law not in drawn:
                drawn[variant.law] = Draws.of(variant, scores, k, draws, samples=8)
            of_law = drawn[variant.law]
            gradients = {n: of_law.gradients(f, variant, exact[variant.law][n][0]) for n, f in losses.items()}
        for name in losses:
            found[name][variant.label] = columns(gradients[name], exact[variant.law][name][1])
    masks = drawn["conditional_bernoulli"].masks[:, 0]
    for name, loss in losses.items():
        for label, estimates in crude(scores, masks, k, loss).items():
            found[name][label] = columns(estimates, exact["conditional_bernoulli"][name][1])
    return found


CRUDE = ("identity, sampled", "two samples, lambda 2.5")


def crude(scores: Tensor, masks: Tensor, k: int, loss: Loss) -> dict[str, Tensor]:
    """Two estimators that are not in the library, for comparison with published numbers: fp64 ``[draws, n]`` from fp64 masks.

    ``CRUDE``: the gradient v of the loss at the drawn gates, unchanged; and the drawn mask minus a second draw at ``scores - lambda v``,
    which is I-MLE without the noise that its two draws share, and without the division by lambda.
    """
    gates = masks.clone().requires_grad_()
    v = torch.autograd.grad(loss(gates).sum(), gates)[0]
    everywhere = torch.ones(masks.shape, dtype=torch.bool)
    law = ConditionalBernoulli((scores - 2.5 * v).float(), torch.tensor(k), everywhere, k)
    return dict(zip(CRUDE, (v, masks - law.sample(torch.rand(masks.shape)).double()), strict=True))


# ---------------------------------------------------------------- the toys


def simple_toy(seed: int, n: int = 10) -> tuple[Tensor, dict[str, Loss]]:
    """Scores fp64 ``[n]`` of the SIMPLE paper's toy, its quadratic loss ``|z - b|^2``, and losses that are not polynomials.

    ``attention``: squared distance of ``sum_i w_i v_i`` from a target, ``w ~ z e^l``, as gates work in this library. ``attention,
    swapped``: the same except for the derivative at dropped gates. Instead of ``e^l / Z (v - out)``, the effect of adding a small amount
    of the position, which is unbounded in l, it is ``e^l / (Z (k - 1) / k + e^l) (v - out)``, the effect of the position in place of an
    average kept one. ``tanh``: a layer of eight tanh units.

    Source: UCLA-StarAI/SIMPLE, tractable_dist: RandomState(seed), scores = randn(n), b = abs(randn(n)).
    """
    random = numpy.random.RandomState(seed)

    def normal(*shape: int) -> Tensor:
        return torch.tensor(random.randn(*shape))

    scores, b = normal(n), normal(n).abs()
    logits, values, target, units, offset = normal(n), normal(n, 4), normal(4), normal(n, 8), normal(8)

    def attention(z: Tensor, swapped: bool = False) -> Tensor:
        z, weights = z.double(), logits.exp()
        if swapped:
            kept = z.detach() > 0
            total, count = (z.detach() * weights).sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
            weights = torch.where(kept, weights, weights * total / (total * (count - 1) / count + weights))
        weights = z * weights
        return (weights @ values / weights.sum(-1, keepdim=True) - target).square().sum(-1)

    return scores, {
        "quadratic": lambda z: (z.double() - b).square().sum(-1),
        "attention": attention,
        "attention, swapped": lambda z: attention(z, swapped=True),
        "tanh": lambda z: (z.double() @ units + offset).tanh().sum(-1),
    }


def bernoulli_toy(probabilities: list[float]) -> tuple[Tensor, Loss]:
    """``sum_i (b - p_i)^2`` with b Bernoulli(sigmoid(phi)) at phi = 0, as the choice of one of two positions with scores (phi, 0), where b
    is the first gate.

    One p of 0.45, 0.49 or 0.499 is the toy of REBAR (Tucker et al. 2017, arXiv:1703.07370); (0.6, 0.51, 0.48) is that of Kool et al.
    2020, arXiv:2002.06043. The gradient is ``sigmoid'(phi) sum_i (1 - 2 p_i)``.
    """
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.zeros(2, dtype=torch.float64), lambda z: (z.double()[..., :1] - p).square().sum(-1)


def optimise(
    variant: Variant, scores: Tensor, k: int, loss: Loss, rate: float, steps: int, momentum: float = 0.0, runs: int = 20
) -> float:
    """Run gradient descent for ``steps`` steps in ``runs`` independent runs; return the mean of the exact ``E[f]`` at their ends, under
    the variant's law."""
    leaf = scores.float().repeat(runs, 1)
    velocity, estimator = torch.zeros_like(leaf), variant.build()
    for _ in range(steps):
        rows = leaf.repeat_interleave(variant.samples, 0).requires_grad_()
        choice = choose(estimator, rows, k, variant.temperature, variant.backward_temperature)
        if choice.log_prob is None:
            surrogate = loss(given(choice.gates)).sum()
        else:
            mean = expected(leaf.double(), k, variant.law, loss) if variant.baseline == "mean" else leaf[:, 0]
            weights = advantages(loss(choice.mask).view(runs, -1), variant.baseline, mean) / variant.samples
            surrogate = (weights.flatten() * choice.log_prob).sum()
        gradient = torch.autograd.grad(surrogate, rows)[0].view(runs, variant.samples, -1).sum(1)
        velocity = momentum * velocity + gradient
        leaf = leaf - rate * velocity
    return expected(leaf.double(), k, variant.law, loss).mean().item()
