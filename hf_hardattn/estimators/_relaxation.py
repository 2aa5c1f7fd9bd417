"""The relaxed k-hot vector of Gumbel top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from ..laws import LOW


def relax(noisy: Tensor, k: Tensor, active: Tensor, temperature: float | Tensor, rounds: int) -> Tensor:
    """Run k rounds of ``a = softmax(w / T)``, ``khot += a``, ``w += log(1 - a)``, and return the sum of the shares.

    ``log(1 - a)`` is exact: for the largest entry, where ``1 - a`` would round to 0 at a low temperature, it is taken
    as ``logsumexp of the others - logsumexp of all``. (A clamp would pick a position that leads by much twice.)

    Args:
        noisy: fp32 ``[..., N]``, w of the first round.
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
