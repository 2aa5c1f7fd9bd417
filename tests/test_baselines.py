"""Baselines: their values, and that none sees the example's own sample."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from hf_hardattn import registry
from hf_hardattn.errors import HardAttentionError

NAMES = registry.names("baselines")


@pytest.mark.parametrize("name", NAMES)
def test_is_per_example_and_blind_to_its_own_reward(name: str) -> None:
    """Shape ``[B]``, no gradient, unchanged when only the example's own reward changes."""
    reward, greedy = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 0.25, 0.125])
    values = []
    for own in (2.0, 50.0):
        torch.manual_seed(0)
        baseline = registry.load("baselines", name)()
        baseline.build(5)
        baseline(torch.tensor([4.0, 8.0]), torch.zeros(2), torch.ones(2, 5))
        reward[1] = own
        values.append(baseline(reward, greedy, torch.ones(3, 5)).detach())
    assert values[0].shape == (3,) and values[0].dtype == torch.float32 and not values[0].requires_grad
    assert values[0][1] == values[1][1]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "learned"])
def test_is_not_in_the_state_dict(name: str) -> None:
    baseline = registry.load("baselines", name)()
    baseline(torch.ones(2), torch.ones(2))
    assert baseline.state_dict() == {} and list(baseline.parameters()) == []
    assert "Source:" in baseline.__doc__


def test_none() -> None:
    assert registry.load("baselines", "none")()(torch.tensor([3.0, 4.0])).tolist() == [0.0, 0.0]


def test_moving_average() -> None:
    """The value before the batch: 0, then the first mean, then the average."""
    baseline = registry.load("baselines", "moving_average")()
    assert baseline(torch.tensor([1.0, 3.0])).tolist() == [0.0, 0.0]
    assert baseline(torch.tensor([12.0])).tolist() == [2.0]
    assert baseline(torch.tensor([0.0, 0.0, 0.0])).tolist() == pytest.approx([3.0] * 3)
    baseline.eval()
    for _ in range(2):
        assert baseline(torch.tensor([100.0])).item() == pytest.approx(2.7)


def test_moving_average_momentum() -> None:
    baseline = registry.load("baselines", "moving_average")(momentum=0)
    baseline(torch.tensor([5.0]))
    baseline(torch.tensor([7.0]))
    assert baseline(torch.tensor([0.0])).item() == 7.0
    for momentum in (1.0, -0.1):
        with pytest.raises(
            HardAttentionError, match=f"momentum={momentum} is out of range at baseline moving_average.*0.9"
        ):
            registry.load("baselines", "moving_average")(momentum=momentum)


def test_whitening_keeps_its_digits_far_from_zero() -> None:
    """One over the deviation that the averages of reward and squared reward have in float64, in whatever pieces a step comes."""
    generator = torch.Generator().manual_seed(0)
    steps = [100 + 0.1 * torch.randn(16, generator=generator) for _ in range(5)]
    mean = square = None
    whole, cut = (registry.load("baselines", "moving_average")(whiten=True) for _ in range(2))
    cut.deferred = True
    assert whole.scale() is None
    for rewards in steps:
        whole(rewards)
        for piece in rewards.split([3, 8, 5]):
            cut(piece)
        cut.update()
        exact = rewards.double()
        mean = exact.mean() if mean is None else 0.9 * mean + 0.1 * exact.mean()
        square = exact.square().mean() if square is None else 0.9 * square + 0.1 * exact.square().mean()
        expected = float((square - mean.square()).rsqrt())
        assert whole.scale().item() == pytest.approx(expected, rel=1e-4)
        assert cut.scale().item() == pytest.approx(whole.scale().item(), rel=1e-5)


def _rank(rank: int, meeting_point: str, results: str) -> None:
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    meeting = f"file://{meeting_point}"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=20), rank=rank, world_size=2)
    baseline = registry.load("baselines", "moving_average")()
    if rank == 0:  # alone: nobody may wait for the other rank
        registry.load("baselines", "leave_one_out")(all_ranks=False)(torch.ones(2))
        registry.load("baselines", "moving_average")()(torch.ones(2))
    baseline.deferred = True
    baseline(torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([9.0]))
    baseline.update()
    torch.save(baseline(torch.zeros(1)), f"{results}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_moving_average_is_over_all_ranks_at_an_optimizer_step_and_waits_for_none_before(tmp_path: Path) -> None:
    """Two ranks with 2 and 1 examples: both hold the mean of the three."""
    multiprocessing.start_processes(_rank, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2, start_method="fork")
    assert [torch.load(tmp_path / f"{rank}.pt").item() for rank in range(2)] == [4.0, 4.0]


def test_self_critical() -> None:
    baseline = registry.load("baselines", "self_critical")()
    assert baseline.needs_greedy
    greedy = torch.tensor([1.0, 5.0], requires_grad=True)
    assert (
        baseline(torch.zeros(2), greedy).tolist() == [1.0, 5.0] and not baseline(torch.zeros(2), greedy).requires_grad
    )
    with pytest.raises(HardAttentionError, match="greedy=None at baseline self_critical.*'leave_one_out'"):
        baseline(torch.zeros(2))


def test_leave_one_out() -> None:
    baseline = registry.load("baselines", "leave_one_out")()
    assert baseline(torch.tensor([1.0, 2.0, 6.0])).tolist() == [4.0, 3.5, 1.5]
    assert baseline(torch.tensor([3.0])).tolist() == [0.0]


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("when", [0, 3], ids=["first", "later"])
@pytest.mark.parametrize("whole_batch", [True, False])
def test_moving_average_leaves_out_rewards_that_are_not_finite(
    whole_batch: bool, when: int, bad: float, whiten: bool
) -> None:
    """As if the bad rewards had never been in the batch."""
    poisoned, clean = (registry.load("baselines", "moving_average")(whiten=whiten) for _ in range(2))
    for step in range(6):
        rewards = torch.rand(4, generator=torch.Generator().manual_seed(step))
        if step == when:
            poisoned(torch.full((4,), bad) if whole_batch else torch.cat([rewards, torch.tensor([bad])]))
            if whole_batch:
                continue
        else:
            poisoned(rewards)
        clean(rewards)
    assert poisoned.value.item() == pytest.approx(clean.value.item())
    assert poisoned.variance.item() == pytest.approx(clean.variance.item())


@pytest.mark.parametrize("bad", BAD)
def test_moving_average_leaves_out_bad_micro_batches(bad: float) -> None:
    baseline = registry.load("baselines", "moving_average")()
    baseline.deferred = True
    for rewards in ([bad, bad], [1.0, 3.0], [bad, 5.0]):
        baseline(torch.tensor(rewards))
    baseline.update()
    assert baseline.value.item() == pytest.approx(3.0) and baseline.variance.item() == pytest.approx(8 / 3)


def test_moving_average_survives_rewards_whose_squares_overflow() -> None:
    baseline = registry.load("baselines", "moving_average")(whiten=True)
    for rewards in ([1.0, 2.0], [1e30, -1e30], [1.0, 2.0]):
        baseline(torch.tensor(rewards))
    assert baseline.value.isfinite() and baseline.scale().isfinite()


@pytest.mark.parametrize("bad", BAD)
def test_moving_average_recovers_from_a_checkpoint_that_is_not_finite(bad: float) -> None:
    baseline = registry.load("baselines", "moving_average")(whiten=True)
    baseline.value, baseline.variance = torch.tensor(bad), torch.tensor(bad)
    assert baseline(torch.tensor([1.0, 3.0])).tolist() == [0.0, 0.0]
    assert baseline.value.item() == 2.0 and baseline.scale().item() == 1.0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_one_bad_reward_leaves_the_other_examples_alone(name: str, bad: float) -> None:
    """The others' baselines, and the gradient of a learned one, stay finite."""
    torch.manual_seed(0)
    baseline = registry.load("baselines", name)()
    baseline.build(5)
    rewards, greedy, summary = torch.tensor([bad, 1.0, 2.0]), torch.tensor([1.0, bad, 2.0]), torch.ones(3, 5)
    summary[0] = bad
    value = baseline(rewards, greedy, summary)
    assert value.isfinite().all()
    lesson = baseline.loss(value, rewards)
    if lesson is not None:
        lesson.backward()
        assert all(p.grad.isfinite().all() for p in baseline.parameters())


def test_leave_one_out_is_the_mean_of_the_other_finite_rewards() -> None:
    baseline = registry.load("baselines", "leave_one_out")()
    assert baseline(torch.tensor([1.0, math.nan, 3.0, math.inf])).tolist() == [3.0, 2.0, 1.0, 2.0]
