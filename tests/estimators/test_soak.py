"""Ten thousand steps in half precision at a low temperature."""

from __future__ import annotations

import pytest
import torch
from choosing import (
    LEARNING,
    build,
    choose,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({v.values[0] for v in LEARNING}))
def test_soak(name: str) -> None:
    """10 000 optimisation steps of bf16 and 10 000 of fp16 scores at temperature 0.1 (eight runs of 1 250 each, side by side; of
    SIMPLE eight of 10 000), towards choices that change their worth now and then: nothing but numbers."""
    torch.manual_seed(0)
    estimator = build(name)
    halves = [torch.nn.Parameter(torch.randn(8, 4).to(dtype)) for dtype in (torch.bfloat16, torch.float16)]
    optimizer = torch.optim.SGD([*halves, *estimator.parameters()], lr=0.3, momentum=0.9, weight_decay=1e-3)
    k = torch.tensor([1, 2, 3, 2]).repeat(4)
    valid = torch.arange(4) < torch.tensor([4, 4, 4, 3]).repeat(4).unsqueeze(-1)
    largest = torch.zeros(())
    for step in range(10_000 if name == "simple" else 1_250):
        if step % 125 == 0:
            worth = 3 * torch.randn(16, 4)
        choice = choose(estimator, {}, torch.cat([half.float() for half in halves]), k, valid, temperature=0.1)
        if choice.gates is None:
            reward = (choice.mask * worth).sum(-1)
            loss = -((reward - reward.mean()) * choice.log_prob).sum()
        else:
            loss = -torch.tanh((choice.gates * worth).sum(-1)).sum()
        for extra in (choice.penalty, choice.entropy):
            loss = loss if extra is None else loss + 0.01 * extra.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for value in (loss, *halves):
            largest = torch.maximum(largest, value.detach().float().abs().max())  # NaN stays NaN
    assert largest.isfinite()
