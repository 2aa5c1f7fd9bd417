"""Counted cost: floating-point operations from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
