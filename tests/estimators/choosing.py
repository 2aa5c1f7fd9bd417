"""Every estimator with its options, rows to choose from, and gradients by enumeration: what the tests of this folder share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_hardattn import registry
from hf_hardattn.estimators import Choice, Estimator, Sampling

NAMES = registry.names("estimators")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "straight_through": [{"surrogate": name} for name in ("sigmoid", "balanced", "softmax", "identity")],
    "gumbel": [{"hard": True}, {"hard": False}],
    "simple": [{"sample": True}, {"sample": False}],
    "reinforce": [{"law": "plackett_luce"}, {"law": "conditional_bernoulli"}],
    "grpo": [{"law": "plackett_luce"}, {"law": "conditional_bernoulli"}],
    "perturbed": [{"hard": True}, {"hard": False}],
    "imle": [
        {"adaptive": adaptive, "noise": noise} for adaptive in (True, False) for noise in ("gumbel", "sum_of_gamma")
    ],
    "entmax": [{"hard": True}, {"hard": False}],
    "sparsemax": [{"hard": True}, {"hard": False}],
    "log_gate": [{"hard": True}, {"hard": False}],
}
VARIANTS = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name in NAMES
    for options in OPTIONS.get(name, [{}])
]


def those(wanted: Callable[[type[Estimator], dict[str, Any]], bool]) -> list[Any]:
    """The variants of which something is true."""
    return [v for v in VARIANTS if wanted(registry.load("estimators", v.values[0]), v.values[1])]


EXACT = those(lambda estimator, _: estimator.exact_budget)
GATED = those(lambda estimator, _: "gates" in estimator.needs and estimator.source != "the model's own attention")
HARD = those(
    lambda estimator, options: "gates" in estimator.needs and estimator.exact_budget and options.get("hard", True)
)
SCORED = those(lambda estimator, _: "reward" in estimator.needs)
LEARNING = GATED + SCORED


def variants(*names: str) -> list[Any]:
    return [v for v in VARIANTS if v.values[0] in names]


def build(name: str, options: dict[str, Any] | None = None) -> Estimator:
    return registry.load("estimators", name)(**(options or {}))


def choose(
    estimator: str | Estimator,
    options: dict[str, Any],
    scores: Tensor,
    k: Tensor | int,
    valid: Tensor | None = None,
    training: bool = True,
    temperature: float = 1.0,
    slots: int | None = None,
    **sampling: Any,
) -> Choice:
    k = torch.as_tensor(k)
    slots = max(1, int(k.max())) if slots is None else slots
    valid = torch.ones(scores.shape, dtype=torch.bool) if valid is None else valid.expand_as(scores)
    estimator = build(estimator, options) if isinstance(estimator, str) else estimator
    how = Sampling(uniform=torch.rand, temperature=temperature, **sampling) if training else None
    return estimator.choose(scores, k.expand(scores.shape[:-1]), valid, slots=slots, sampling=how)


def carrier(choice: Choice) -> Any:
    """What the gradient flows through."""
    return choice.log_prob if choice.gates is None else choice.gates


def mixed_rows(scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[2, 3, 4, 9]`` with their own k and padding; k = 0, k > valid and all-padding rows among them."""
    torch.manual_seed(5)
    scores = scale * torch.randn(2, 3, 4, 9)
    k = torch.randint(0, 8, (2, 3, 4))
    valid = torch.rand(2, 3, 4, 9) < 0.7
    valid[0, 0], valid[0, 1] = False, True
    return scores, k, valid


def exact_gradient(scores: Tensor, k: int, law: str, reward: Any) -> Tensor:
    """``d/ds sum_S p(S) reward(S)`` by enumeration in float64; Plackett-Luce by looping over orders."""
    leaf = scores.double().requires_grad_()
    n, total = len(scores), leaf.new_zeros(())
    if law == "conditional_bernoulli":
        chosen = list(itertools.combinations(range(n), k))
        logits = torch.stack([leaf[list(c)].sum() for c in chosen]).log_softmax(0)
    else:
        chosen, logits = list(itertools.permutations(range(n), k)), []
        for order in chosen:
            left, log = list(range(n)), leaf.new_zeros(())
            for pick in order:
                log = log + leaf[pick] - leaf[left].logsumexp(0)
                left.remove(pick)
            logits.append(log)
    for order, log in zip(chosen, logits, strict=True):
        mask = torch.zeros(n, dtype=torch.float64)
        mask[list(order)] = 1.0
        total = total + log.exp() * reward(mask)
    return torch.autograd.grad(total, leaf)[0]


def sampled_gradients(
    name: str, options: dict[str, Any], scores: Tensor, k: int, reward: Any, draws: int, **sampling: Any
) -> Tensor:
    """One gradient estimate per row, ``[draws, n]``; of as many samples, with their advantages, as the estimator takes."""
    estimator = build(name, options)
    samples = estimator.samples
    rows = scores.repeat(samples * draws, 1).requires_grad_()
    choice = choose(estimator, options, rows, k, **sampling)
    if choice.log_prob is None:
        loss = reward(choice.gates.double()).sum()
    else:
        weights = reward(choice.mask.double()).float().view(samples, draws)
        if samples > 1:
            weights = torch.stack([estimator.advantage(weights[i], others(weights, i)) for i in range(samples)])
        loss = (weights.flatten() * choice.log_prob).sum() / samples
    return torch.autograd.grad(loss, rows)[0].double().view(samples, draws, -1).sum(0)


def others(weights: Tensor, one: int) -> Tensor:
    """All rows but one."""
    return torch.cat([weights[:one], weights[one + 1 :]])


def largest_z(gradients: Tensor, exact: Tensor) -> float:
    error = gradients.std(0) / math.sqrt(len(gradients))
    # a deterministic estimator has no spread: any deviation above fp32 rounding counts
    return ((gradients.mean(0) - exact).abs() / (error + 1e-6)).max().item()


def linear(z: Tensor) -> Tensor:
    return z @ torch.linspace(-1, 2, z.shape[-1], dtype=torch.float64)


def curved(z: Tensor) -> Tensor:
    """A loss that no polynomial of low degree equals: the difference between biased and unbiased shows."""
    return torch.exp(z @ torch.linspace(-1, 1.5, z.shape[-1], dtype=torch.float64))


def quadratic(z: Tensor) -> Tensor:
    n = z.shape[-1]
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return ((z @ matrix) * z).sum(-1) + linear(z)
