"""Noise for sampled choices: it differs between examples and ranks, and gradient checkpointing replays it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass
class _Keys:
    """Keys for the random numbers of a forward pass, one for each example.

    Attributes:
        seed: of the run. examples: int64 ``[B]``, the keys.
        draws: maps the number that torch's default generator gave at the start of a draw to the index of the draw in the pass. A
            recomputation in the backward pass gets the same number again, and so finds the same index.
    """

    seed: int
    examples: Tensor
    draws: dict[int, int] = field(default_factory=dict)


# A module variable and not a ContextVar: a recomputation runs in a thread of autograd, which does not have the caller's context.
_keys: _Keys | None = None


@contextmanager
def keyed(seed: int, examples: Tensor) -> Iterator[None]:
    """Make the noise inside the block a function of the example, independent of the batch and rank it is in.

    A number then depends only on ``seed``, the example's key, the index of the draw in the pass, and the coordinates (head, query,
    position). It does not depend on the rank, the batch size, the gradient accumulation or the padding. Estimators that use the
    number of each position by itself (Gumbel and Plackett-Luce orders) therefore make the same choice in every layout; for SIMPLE,
    whose tree spans the positions, this holds only if the rows have equal length.

    Args:
        seed: of the run.
        examples: int64 ``[B]``, a key >= 0 for each row of the batch, never used twice in a run: the position of the example in
            the order of the whole training.

    Cost: about ten integer operations per number; there is no state.
    Source: counter-based generators, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixing function is
    that of SplitMix64, Steele, Lea & Flood 2014.
    """
    global _keys
    before, _keys = _keys, _Keys(seed, examples)
    try:
        yield
    finally:
        _keys = before


def uniform(shape: tuple[int, ...], device: torch.device, batch_axis: int = 0) -> Tensor:
    """Draw fp32 noise in the open interval (0, 1).

    Inside ``keyed`` the noise is a function of the example. Outside, it follows ``torch.manual_seed``, and gradient checkpointing
    replays it, since checkpointing restores torch's default generators. Trainers use the same seed on every rank, so under
    ``torch.distributed`` each rank mixes its number into a seed drawn from the default CPU generator.

    Args:
        batch_axis: the axis of ``shape`` along which the examples lie.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if _keys is None and not distributed:
        noise = torch.rand(shape, device=device)
    else:
        seed = int(torch.randint(2**62, (1,)))
        if _keys is not None and shape[batch_axis] % len(_keys.examples) == 0:
            noise = _hashed(_keys, seed, shape, device, batch_axis)
        else:
            if distributed:
                seed ^= torch.distributed.get_rank() * _GOLDEN % 2**62
            noise = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(seed))
    return noise.clamp(1e-7, 1 - 1e-7)


def _hashed(keys: _Keys, tag: int, shape: tuple[int, ...], device: torch.device, batch_axis: int) -> Tensor:
    draw = keys.draws.setdefault(tag, len(keys.draws))
    start = mix_number(mix_number(keys.seed) ^ draw)
    examples, copies = keys.examples.to(device), shape[batch_axis] // len(keys.examples)
    if copies > 1:  # a model that repeats its examples: each copy gets its own noise
        examples = (examples[:, None] * copies + torch.arange(copies, device=device)).flatten()
    state = _mix(examples ^ _signed(start)).view(-1, *[1] * (len(shape) - 1 - batch_axis))
    for axis, size in enumerate(shape):
        if axis != batch_axis:
            place = torch.arange(size, device=device).view(-1, *[1] * (len(shape) - 1 - axis))
            state = _mix(state ^ (place + 1) * _signed(_GOLDEN))
    return (_shift(state, 40).float() + 0.5) * 2.0**-24


def mix_number(number: int) -> int:
    """Scramble an integer into 64 bits: similar inputs give unrelated outputs."""
    number = (number + _GOLDEN) & _MASK
    number = ((number ^ number >> 30) * _FIRST) & _MASK
    number = ((number ^ number >> 27) * _SECOND) & _MASK
    return number ^ number >> 31


def _mix(state: Tensor) -> Tensor:
    """``mix_number`` for int64 tensors, which wrap around."""
    state = state + _signed(_GOLDEN)
    state = (state ^ _shift(state, 30)) * _signed(_FIRST)
    state = (state ^ _shift(state, 27)) * _signed(_SECOND)
    return state ^ _shift(state, 31)


def _shift(state: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros."""
    return state >> by & 2 ** (64 - by) - 1


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
