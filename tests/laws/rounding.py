"""How far apart two ways to compute the same numbers may be.

The same computation on the same shapes gives the same bits: tests that claim this compare with ``torch.equal``, or with a tolerance of
0. Nothing promises as much across batch shapes, threads, executions (masked, gathered, packed) or processors, since a matrix product
may add up in another order there, and every order rounds differently. Such results are compared with ``tolerance``, in units of the
dtype.

Choices (what a site keeps, which token is written) are the same across all of these as long as no two candidates come within rounding
of each other. With the weights of the tests none do, so that choices are compared with ``torch.equal`` everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW, SOME, MANY = (
    16,
    80,
    800,
)  # units: the same layers once more; other shapes, a whole model long; other sums altogether, or gradients


def tolerance(dtype: torch.dtype, units: float) -> float:
    """``units`` in the last place of numbers around 1 in ``dtype``; 0 for integers, which are not rounded."""
    return units * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def assert_rounded(found: Tensor, expected: Tensor, units: float = SOME, name: str = "") -> None:
    """Assert equality up to ``units`` of the largest entry (of 1 where all are smaller).

    Of the largest: what is near zero is the sum of numbers that are not, and has their rounding.
    """
    scale = max(1.0, expected.abs().max().item()) if expected.is_floating_point() and expected.numel() else 1.0
    atol = scale * tolerance(expected.dtype, units)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}" if name else m)
