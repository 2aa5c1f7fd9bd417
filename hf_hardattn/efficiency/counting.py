"""Counted cost: floating-point operations from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..registration import set_step


def count_training_flops(model: nn.Module, batch: Mapping[str, Any], steps: int, points: int = 8) -> int:
    """Count the FLOPs of ``steps`` training steps on batches like this one: forward and backward, matrix products only.

    A budget that changes with the step changes what a gathered step costs, so steps all along the training are counted and the
    mean is taken. Weights, gradients and the state of the random numbers are left as they were.

    Args:
        batch: with ``labels``. steps: of the training, >= 1. points: steps that are counted.
    """
    training, kept = model.training, [(p, p.grad) for p in model.parameters()]
    chosen = sorted({round(step) for step in torch.linspace(0, steps - 1, points).tolist()})
    model.train()
    for parameter, _ in kept:
        parameter.grad = None
    counted = 0
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            for step in chosen:
                set_step(model, step, steps)
                with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                    model(**batch).loss.backward()
                counted += counter.get_total_flops()
    finally:
        model.train(training)
        for parameter, gradient in kept:
            parameter.grad = gradient
    return counted * steps // len(chosen)


@torch.no_grad()
def count_flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Count the FLOPs executed by one forward of ``model`` in evaluation mode (two per multiply-add, matrix products only).

    Attention runs through its mathematical form while it is counted: PyTorch's counter does not see the fused CPU kernel.
    Masked execution shows no saving here, because it saves nothing; gathered execution shows what it saves.
    """
    training = model.training
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**batch)
    finally:
        model.train(training)
    return counter.get_total_flops()
