"""Products of many small polynomials in a balanced tree: up for a coefficient, down for its derivative or a sample.

A polynomial is its coefficients along the last dimension, power 0 first; in ``laws`` coefficient c of a node is the
probability that c of the positions below it are on. All coefficients are >= 0, so no sum here cancels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# numbers in one temporary: 4 MiB of fp32
PART = 2**20


def tree(leaves: Tensor, degree: int) -> list[Tensor]:
    """Multiply polynomials pairwise, level by level, until two are left; powers above ``degree`` are dropped.

    Args:
        leaves: fp32 ``[..., N, 2]``, coefficients of 1 and x.
        degree: largest power kept, >= 1.

    Returns:
        one fp32 ``[..., nodes, powers]`` per level, leaves first; an odd level gets one more node, the polynomial 1.
    """
    levels = []
    while True:
        if leaves.shape[-2] % 2:
            one = torch.zeros_like(leaves[..., :1, :])
            one[..., 0] = 1.0
            leaves = torch.cat([leaves, one], -2)
        levels.append(leaves)
        if leaves.shape[-2] == 2:
            return levels
        leaves = _Multiply.apply(leaves[..., ::2, :], leaves[..., 1::2, :], degree)


def outside(levels: list[Tensor], count: Tensor) -> Tensor:
    """Weigh everything outside each leaf, at the count the leaf leaves to it: the derivative of the root's coefficient.

    Top-down, ``out_left[a] = sum_b out_parent[a + b] right[b]``, and the same for the right child.

    Args:
        levels: what ``tree`` returned.
        count: int64 ``[...]``, the coefficient of the root that is asked for.

    Returns:
        fp32 ``[..., N or N + 1, 2]``: d root[count] / d leaves (an added leaf is last).
    """
    outer = complement(levels[-1].flip(-2), count.unsqueeze(-1))
    for pairs in reversed(levels[:-1]):
        siblings = torch.stack([pairs[..., 1::2, :], pairs[..., ::2, :]], -2)
        parents = outer[..., : siblings.shape[-3], :].unsqueeze(-2)
        parents = parents.expand(*siblings.shape[:-1], outer.shape[-1])
        outer = _Correlate.apply(parents, siblings, siblings.shape[-1]).flatten(-3, -2)
    return outer


def descend(levels: list[Tensor], count: Tensor, uniform: Tensor) -> Tensor:
    """Split a count over the leaves, from the root down, each way with its exact probability.

    ``P(a on the left | c in the node) = left[a] right[c - a] / node[c]``, inverted with one uniform number per node.

    Args:
        levels: what ``tree`` returned.
        count: int64 ``[...]``, of the root.
        uniform: fp32 ``[..., N]`` in [0, 1]; N - 1 of them are used.

    Returns:
        int64 ``[..., N]`` of 0 and 1 that sums to ``count``.
    """
    counts, used, n = count.unsqueeze(-1), 0, uniform.shape[-1]
    for depth in reversed(range(len(levels))):
        level, nodes = levels[depth].detach(), -(-n // 2**depth)
        # an odd level was given an empty node: its pair has nothing to split and takes no noise
        noise = functional.pad(uniform[..., used : used + nodes // 2], (0, nodes % 2), value=0.5)
        left = _split(level[..., ::2, :], level[..., 1::2, :], counts, noise)
        counts = torch.stack([left, counts - left], -1).flatten(-2)[..., :nodes]
        used += nodes // 2
    return counts


def complement(right: Tensor, count: Tensor) -> Tensor:
    """Return ``right[count - a]`` for every power a, 0 where there is no such power.

    Args:
        right: fp32 ``[..., d + 1]``.
        count: int64 ``[...]``, broadcastable.
    """
    size = right.shape[-1]
    index = count.unsqueeze(-1) - torch.arange(size, device=right.device)
    inside = (index >= 0) & (index < size)
    return torch.where(inside, right.gather(-1, index.clamp(0, size - 1).expand(right.shape)), 0.0)


def _split(left: Tensor, right: Tensor, count: Tensor, uniform: Tensor) -> Tensor:
    """Draw how many of ``count`` fall to the left child, int64 ``[..., M]``, by inverting the cumulative sum."""
    weights = left * complement(right, count)
    total = weights.cumsum(-1)
    index = torch.arange(weights.shape[-1], device=weights.device)
    possible = weights > 0
    beyond = possible & (total > uniform.unsqueeze(-1) * total[..., -1:])
    # a count of weight 0 is never taken, whatever rounding does to the sums; at u = 1 the last possible one is
    last = torch.where(possible, index, 0).amax(-1)
    return torch.minimum(torch.where(beyond, index, weights.shape[-1]).amin(-1), last)


def _windows(x: Tensor, before: int, after: int, size: int) -> Tensor:
    """View ``x`` with zeros (or, below 0, cuts) at both ends as its windows of ``size``: a Toeplitz matrix."""
    return functional.pad(x, (before, after)).unfold(-1, size, 1)


def _contract(windows: Tensor, x: Tensor) -> Tensor:
    """Sum ``windows[..., c, i] x[..., i]`` over i, some c at a time: bounded memory, and faster than all at once."""
    # multiply and sum, not a matrix product: autocast and TF32 would round that one, and the law with it
    parts = windows.chunk(max(1, windows.numel() // PART), -2)
    return torch.cat([(part * x.unsqueeze(-2)).sum(-1) for part in parts], -1)


# The two products are each other's derivatives. As autograd functions they save the polynomials; the Toeplitz matrix,
# k times larger, lives only inside one product, and its gradient is never formed.
class _Multiply(torch.autograd.Function):
    """``out[c] = sum_a left[a] right[c - a]`` for c up to ``degree``."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, degree: int) -> Tensor:
        a, b = left.shape[-1], right.shape[-1]
        windows = _windows(right, a - 1, min(a + b - 2, degree) + 1 - b, a)
        return _contract(windows, left.flip(-1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        grad = grads[0]
        return _Correlate.apply(grad, right, left.shape[-1]), _Correlate.apply(grad, left, right.shape[-1]), None


class _Correlate(torch.autograd.Function):
    """``out[a] = sum_b outer[a + b] inner[b]`` for a below ``size``."""

    @staticmethod
    def forward(outer: Tensor, inner: Tensor, size: int) -> Tensor:
        b = inner.shape[-1]
        return _contract(_windows(outer, 0, size + b - 1 - outer.shape[-1], b), inner)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        outer, inner = ctx.saved_tensors
        length = outer.shape[-1]
        spread = _Multiply.apply(grads[0], inner, length - 1)
        spread = functional.pad(spread, (0, length - spread.shape[-1]))
        return spread, _Correlate.apply(outer, grads[0], inner.shape[-1]), None
