"""The terms that a site adds to the training loss, each against its formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from choosing import build
from torch import Tensor

from hf_hardattn.losses.score_function import auxiliary_loss
from hf_hardattn.modeling.selection import Selection

B = 4


def selection(**parts: Tensor) -> Selection:
    """Two heads and three queries of ``B`` examples."""
    mask = torch.ones(B, 2, 3, 5, dtype=torch.bool)
    return Selection("site", mask, mask, None, torch.zeros(B, 2, 3, 5), **parts)


def selectors(**parts: Any) -> dict[str, Any]:
    parts = {"estimator": build("reinforce"), "baseline": None, "entropy_weight": 0.0, "weight": 1.0, **parts}
    config = SimpleNamespace(score_function_weight=parts.pop("weight"))
    return {"site": SimpleNamespace(config=config, now=lambda schedule: schedule, **parts)}


@pytest.mark.parametrize("name", ["rloo", "sfess", "grpo"])
def test_samples_are_weighed_by_their_estimators_advantage(name: str) -> None:
    reward, others, log_prob = torch.randn(B), torch.randn(3, B), torch.randn(B, 2, 3, requires_grad=True)
    estimator = build(name)
    found = auxiliary_loss(
        [selection(log_prob=log_prob)], selectors(estimator=estimator, weight=0.5), reward, None, others
    )
    advantage = reward - others.mean(0)
    if name == "grpo":
        group = torch.cat([reward[None], others])
        advantage = (reward - group.mean(0)) / (group.std(0, correction=0) + 1e-4)
    torch.testing.assert_close(found, -0.5 * (advantage * log_prob.sum((1, 2))).mean())


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_one_reward_for_the_batch_credits_every_selection(name: str) -> None:
    reward, others, log_prob = torch.tensor(2.0), torch.tensor([1.0, 0.0]), torch.randn(B, 2, 3)
    found = auxiliary_loss([selection(log_prob=log_prob)], selectors(estimator=build(name)), reward, None, others)
    advantage = 1.5 if name == "rloo" else 1 / ((2 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(found, -advantage * log_prob.sum())


@pytest.mark.parametrize("name", ["rloo", "grpo"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_other_examples_stand_in_for_other_samples(name: str, count: int) -> None:
    """A single pass of an estimator of several: each example against all others, alone against nothing."""
    reward, log_prob = torch.randn(count), torch.randn(count, 2, 3)
    found = auxiliary_loss([selection(log_prob=log_prob)], selectors(estimator=build(name)), reward)
    if name == "rloo":
        advantage = reward - (reward.sum() - reward) / max(count - 1, 1)
    else:
        advantage = (reward - reward.mean()) / (reward.std(correction=0) + 1e-4)
    torch.testing.assert_close(found, -(advantage * log_prob.sum((1, 2))).mean())


def test_terms_without_a_reward() -> None:
    """Penalty and entropy bonus add up over sites; without any term there is no loss."""
    penalty, entropy = torch.rand(B, 2, 3), torch.rand(B, 2, 3)
    made = selection(penalty=penalty, entropy=entropy, log_prob=torch.randn(B, 2, 3))
    found = auxiliary_loss([made, made], selectors(entropy_weight=0.3), None)
    torch.testing.assert_close(found, 2 * (penalty.mean() - 0.3 * entropy.mean()))
    assert auxiliary_loss([selection(log_prob=torch.randn(B, 2, 3))], selectors(), None) is None
    assert auxiliary_loss([], selectors(), torch.randn(B)) is None


def test_a_baseline_that_learns_and_whitens() -> None:
    class Half(torch.nn.Module):
        def forward(self, reward: Tensor, greedy: Tensor | None, summary: Tensor | None) -> Tensor:
            return reward / 2 if greedy is None else greedy

        def loss(self, value: Tensor, reward: Tensor) -> Tensor:
            return (value - reward).square().sum()

        def scale(self) -> Tensor:
            return torch.tensor(3.0)

    reward, greedy, log_prob = torch.randn(B), torch.randn(B), torch.randn(B, 2, 3)
    for given, baseline in ((None, reward / 2), (greedy, greedy)):
        found = auxiliary_loss([selection(log_prob=log_prob)], selectors(baseline=Half()), reward, given)
        surrogate = -(3 * (reward - baseline) * log_prob.sum((1, 2))).mean()
        torch.testing.assert_close(found, surrogate + (baseline - reward).square().sum())
