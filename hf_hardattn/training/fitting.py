"""Train a model on a task with a plain PyTorch loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from ..api import set_step
from .tasks import Base, Recipe


class Diverged(ArithmeticError):
    """The loss is no longer finite."""


def fit(
    model: PreTrainedModel,
    task: Base,
    recipe: Recipe,
    *,
    seed: int,
    branch: bool,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place, on its device: a soft base checkpoint at a constant learning rate, a branch from it with linear decay.

    Args:
        seed: seed of the batches. branch: whether this is a branch. on_step: called with the step and its loss.

    Returns:
        The loss of every step.

    Raises:
        Diverged: a loss is not finite.
    """
    steps, warmup = (recipe.branch_steps, recipe.branch_warmup) if branch else (recipe.trunk_steps, recipe.trunk_warmup)
    ramp = 0.0 if branch else recipe.ramp * steps
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps if branch else 1.0)
    )
    model.train()
    losses = []
    for step in range(steps):
        set_step(model, step, steps)
        drawn = task.draw(recipe.batch, generator, min(1.0, step / ramp) if ramp else 1.0)
        batch: dict[str, Any] = send_to_device(drawn, model.device)
        loss = model(**batch).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged(f"the loss is {losses[-1]} at step {step} of {steps}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, losses[-1])
    return losses
