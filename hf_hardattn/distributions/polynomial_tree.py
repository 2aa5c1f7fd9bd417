"""Products of many small polynomials in a balanced tree: up for a coefficient, down for its derivative or a sample.

The coefficients of a polynomial lie along the FIRST dimension, power 0 first, the polynomials along the second, followed by the
rows: ``[powers, nodes, ...]``, so that each operation runs over all rows at once. In ``ConditionalBernoulli``, coefficient c of a
node is the probability that c of the positions below it are on. All coefficients are >= 0, so no sum here cancels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# How a product is computed: one power of a factor after the other if the factor has up to SHORT powers or the result at least
# LARGE numbers. Otherwise as a Toeplitz matrix, in parts of PART numbers (4 MiB of fp32), which launches fewer operations.
SHORT, LARGE, PART = 16, 2**14, 2**20


def tree(leaves: Tensor, degree: int) -> list[Tensor]:
    """Multiply polynomials pairwise, level by level, until two are left; powers above ``degree`` are dropped.

    The first half of a level's nodes is multiplied by the second.

    Args:
        leaves: fp32 ``[2, N, ...]``, coefficients of 1 and x.
        degree: largest power kept, >= 1.

    Returns:
        one fp32 ``[powers, nodes, ...]`` per level, leaves first; a level with an odd number of nodes gets one more, the polynomial 1.
    """
    levels = []
    while True:
        if leaves.shape[1] % 2:
            one = torch.zeros_like(leaves[:, :1])
            one[0] = 1.0
            leaves = torch.cat([leaves, one], 1)
        levels.append(leaves)
        if leaves.shape[1] == 2:
            return levels
        leaves = _Multiply.apply(*leaves.chunk(2, 1), degree)


def outside(levels: list[Tensor], count: Tensor) -> Tensor:
    """Return the derivative of one coefficient of the root with respect to the coefficients of the leaves.

    Top-down, ``out_left[a] = sum_b out_parent[a + b] right[b]``, and the same for the right child.

    Args:
        levels: as returned by ``tree``.
        count: int64 ``[...]``, the power of the coefficient.

    Returns:
        fp32 ``[2, N or N + 1, ...]``: d root[count] / d leaves (a leaf added by ``tree`` is last).
    """
    outer = complement(levels[-1].flip(1), count)
    for pairs in reversed(levels[:-1]):
        left, right = pairs.chunk(2, 1)
        parents = outer[:, : left.shape[1]]
        outer = _Correlate.apply(torch.cat([parents, parents], 1), torch.cat([right, left], 1), len(pairs))
    return outer


def descend(levels: list[Tensor], count: Tensor, uniform: Tensor) -> Tensor:
    """Sample how a count splits over the leaves, from the root down, with the exact probabilities.

    ``P(a on the left | c in the node) = left[a] right[c - a] / node[c]``, inverted with one uniform number per node.

    Args:
        levels: as returned by ``tree``.
        count: int64 ``[...]``, of the root.
        uniform: fp32 ``[N, ...]`` in [0, 1]; N - 1 of them are used.

    Returns:
        int64 ``[N, ...]`` of 0 and 1 that sums to ``count``.
    """
    counts, used, n = count.unsqueeze(0), 0, len(uniform)
    for depth in reversed(range(len(levels))):
        nodes = -(-n // 2**depth)
        # A level with an odd number of nodes has an empty one: its pair has nothing to split and needs no noise.
        noise = uniform[used : used + nodes // 2]
        if nodes % 2:
            noise = torch.cat([noise, torch.full_like(uniform[:1], 0.5)])
        left, right = levels[depth].detach().chunk(2, 1)
        taken = _split(left, right, counts, noise)
        counts = torch.cat([taken, counts - taken])[:nodes]
        used += nodes // 2
    return counts


def complement(right: Tensor, count: Tensor) -> Tensor:
    """Return ``right[count - a]`` for every power a, or 0 if there is no such power.

    Args:
        right: fp32 ``[d + 1, ...]``.
        count: int64 ``[...]``, broadcastable to the dimensions of ``right`` after the first.
    """
    size = len(right)
    index = count - torch.arange(size, device=right.device).view(-1, *[1] * (right.dim() - 1))
    inside = (index >= 0) & (index < size)
    return torch.where(inside, right.gather(0, index.clamp(0, size - 1).expand(right.shape)), 0.0)


def _split(left: Tensor, right: Tensor, count: Tensor, uniform: Tensor) -> Tensor:
    """Draw how many of ``count`` fall to the left child, int64 ``[nodes, ...]``, by inverting the cumulative sum."""
    weights = left * complement(right, count)
    total = weights.cumsum(0)
    index = torch.arange(len(weights), device=weights.device).view(-1, *[1] * (weights.dim() - 1))
    possible = weights > 0
    beyond = possible & (total > uniform * total[-1])
    # A count of weight 0 is never drawn, whatever rounding does to the sums; at u = 1 the last possible count is drawn.
    last = torch.where(possible, index, 0).amax(0)
    return torch.minimum(torch.where(beyond, index, len(weights)).amin(0), last)


def _windows(x: Tensor, before: int, after: int, size: int) -> Tensor:
    """View ``x``, padded with zeros (or cut, if negative) at both ends, as windows of ``size``: ``[windows, ..., size]``."""
    return functional.pad(x, (*[0, 0] * (x.dim() - 1), before, after)).unfold(0, size, 1)


def _contract(windows: Tensor, x: Tensor) -> Tensor:
    """Sum ``windows[c, ..., i] x[i]`` over i, for a few c at a time: this bounds the memory and is faster than all at once."""
    # Multiply and sum instead of a matrix product, which autocast and TF32 would round.
    parts = windows.chunk(max(1, windows.numel() // PART))
    return torch.cat([(part * x.movedim(0, -1)).sum(-1) for part in parts])


# The two products are each other's derivatives. As autograd functions, they save only the polynomials: a tensor k times as
# large exists only inside one product, if at all, and its gradient is never computed.
class _Multiply(torch.autograd.Function):
    """``out[c] = sum_a left[a] right[c - a]`` for c up to ``degree``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor, degree: int) -> Tensor:
        a, b = len(left), len(right)
        size = min(a + b - 2, degree) + 1
        if a > SHORT and size * left[0].numel() < LARGE:
            return _contract(_windows(right, a - 1, size - b, a), left.flip(0))
        out = left.new_zeros(size, *left.shape[1:])
        for i in range(min(a, size)):
            out[i : i + b].addcmul_(left[i], right[: size - i])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        grad = grads[0]
        return _Correlate.apply(grad, right, len(left)), _Correlate.apply(grad, left, len(right)), None


class _Correlate(torch.autograd.Function):
    """``out[a] = sum_b outer[a + b] inner[b]`` for a below ``size``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outer: Tensor, inner: Tensor, size: int) -> Tensor:
        length, b = len(outer), len(inner)
        if b > SHORT and size * inner[0].numel() < LARGE:
            return _contract(_windows(outer, 0, size + b - 1 - length, b), inner)
        out = outer.new_zeros(size, *outer.shape[1:])
        for i in range(min(b, length)):
            out[: length - i].addcmul_(outer[i : i + size], inner[i])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        outer, inner = ctx.saved_tensors
        length = len(outer)
        spread = _Multiply.apply(grads[0], inner, length - 1)
        spread = functional.pad(spread, (*[0, 0] * (spread.dim() - 1), 0, length - len(spread)))
        return spread, _Correlate.apply(outer, grads[0], len(inner)), None
