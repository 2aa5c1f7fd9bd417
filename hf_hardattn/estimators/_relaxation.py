"""The relaxed k-hot vector of Gumbel top-k, and Gumbel noise conditioned on the order that it produced."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import LOW, PlackettLuce


def relax(noisy: Tensor, k: Tensor, active: Tensor, temperature: float | Tensor, rounds: int) -> Tensor:
    """Run k rounds of ``a = softmax(w / T)``, ``khot += a``, ``w += log(1 - a)``, and return the sum of the shares.

    ``log(1 - a)`` is exact: for the largest entry, where ``1 - a`` would round to 0 at a low temperature, it is computed
    as ``logsumexp of the others - logsumexp of all``. (With a clamp, a position that leads by a wide margin would be picked twice.)

    Args:
        noisy: fp32 ``[..., N]``, the w of the first round.
        k: int64, broadcastable to ``[...]``; 0 in rows without a choice.
        active: bool, shape of ``noisy``; False positions get no share.
        temperature: > 0; a number or fp32, broadcastable to ``[..., 1]``.
        rounds: upper bound of ``k``.

    Returns:
        fp32 ``[..., N]``, summing to ``k`` per row.

    Source: Xie & Ermon 2019, arXiv:1901.10517, algorithm 1.
    """
    khot = torch.zeros_like(noisy)
    for done in range(rounds):
        logits = (noisy / temperature).masked_fill(~active, LOW)
        share = torch.where(active, logits.softmax(-1), 0.0)
        open_row = (k > done).unsqueeze(-1)
        khot = khot + share * open_row
        if done + 1 == rounds:
            break
        leads = torch.zeros_like(active).scatter(-1, logits.argmax(-1, keepdim=True), True)
        others = logits.masked_fill(leads, LOW).logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)
        left = torch.where(leads, others, torch.log1p(-share.masked_fill(leads, 0.0)))
        noisy = torch.where(active & open_row, noisy + left, noisy)
    return khot


@torch.no_grad()
def noisy_given_order(law: PlackettLuce, order: Tensor, uniform: Tensor) -> Tensor:
    """Draw scores plus Gumbel noise, given that the largest ones are those of ``order``, in that order.

    ``exp(-(s_j + G_j))`` is the arrival time of an exponential clock of rate ``e^{s_j}``, and the waiting times between the first k
    arrivals do not depend on which clocks arrive. The conditional law therefore has a closed form, which ``gumbel_rao`` states.

    Args:
        law: the distribution over rows ``[..., N]``.
        order: int64 ``[..., slots]`` from ``law.outcome``.
        uniform: fp32 ``[M, ..., N]`` in [0, 1].

    Returns:
        fp32 ``[M, ..., N]``; meaningless, but finite, where ``law.active`` is False.
    """
    limits = torch.finfo(torch.float32)
    waits = torch.log(-torch.log(uniform.float().clamp(limits.tiny, 1 - limits.eps / 2)))
    counts = (torch.arange(order.shape[-1], device=order.device) < law.k.unsqueeze(-1)) & law.free.unsqueeze(-1)
    scores = law.scores.masked_fill(~law.active, LOW)
    picked = scores.gather(-1, order).masked_fill(~counts, LOW)
    rest = scores.masked_fill(law.mask_of(order), LOW).logsumexp(-1, keepdim=True)
    rates = torch.cat([picked, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]
    order = order.expand(*uniform.shape[:-1], -1)
    gaps = (waits.gather(-1, order) - rates).masked_fill(~counts, LOW)
    arrivals = gaps.logcumsumexp(-1)
    others = torch.logaddexp(arrivals[..., -1:], waits - law.scores)
    return -others.scatter(-1, order, torch.where(counts, arrivals, others.gather(-1, order)))
