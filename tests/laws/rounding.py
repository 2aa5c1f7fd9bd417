"""How far apart two ways to compute the same numbers may be.

The same computation on the same shapes gives the same bits: tests that claim this compare with ``torch.equal``, or with a tolerance of
0. Nothing promises as much across batch shapes, threads, executions (masked, gathered, packed) or processors, since a matrix product
may add up in another order there, and every order rounds differently. Such results are compared with ``tolerance``.
"""

from __future__ import annotations

import torch


def tolerance(dtype: torch.dtype, units: float) -> float:
    """``units`` in the last place of numbers around 1 in ``dtype``: what rounding may add up to, of a result of that size."""
    return units * torch.finfo(dtype).eps
