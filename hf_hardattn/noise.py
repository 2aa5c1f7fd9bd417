"""Noise for sampled choices: different on every rank, replayed under gradient checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw fp32 noise in the open interval (0, 1).

    It follows ``torch.manual_seed``, and gradient checkpointing replays it, since checkpointing restores torch's default
    generators. Trainers seed every rank alike, so under ``torch.distributed`` each rank mixes its number into a seed
    drawn from the default CPU generator.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seed = int(torch.randint(2**62, (1,))) ^ (torch.distributed.get_rank() * 0x9E3779B97F4A7C15 % 2**62)
        noise = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(seed))
    else:
        noise = torch.rand(shape, device=device)
    return noise.clamp(1e-7, 1 - 1e-7)
