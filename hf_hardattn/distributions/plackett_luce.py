"""The Plackett-Luce distribution: one position after the other, by a softmax over those that remain."""

from __future__ import annotations

import torch
from torch import Tensor

from .subset import LOW, SubsetLaw, gumbel_noise


class PlackettLuce(SubsetLaw):
    """Draw positions one after the other without replacement, each by the softmax over those that remain.

    ``log p(i_1, ..., i_k) = sum_j ( s_{i_j} - logsumexp of the scores not drawn before j )`` is the log-probability of the
    ORDER drawn. As a score function it is unbiased for any function of the set, since the order determines the set.

    Source: Kool, van Hoof & Welling 2019, "Stochastic Beams and Where to Find Them", arXiv:1903.06059, section 3.
    """

    def outcome(self, uniform: Tensor, flat: Tensor | None = None) -> Tensor:
        """Draw an ordered sample by Gumbel-top-k: the ``k`` largest of ``scores + Gumbel noise``, largest first.

        Args:
            uniform: fp32 ``[..., N]`` in [0, 1]. flat: bool ``[...]`` or None; rows in which all scores are taken as equal.

        Returns:
            int64 ``[..., slots]``; only the first ``k`` entries of a row count.
        """
        scores = self.scores.detach()
        scores = scores if flat is None else scores.masked_fill(flat.unsqueeze(-1), 0.0)
        noisy = (scores + gumbel_noise(uniform)).masked_fill(~self.active, LOW)
        return noisy.topk(self.slots, dim=-1).indices

    def mask_of(self, order: Tensor) -> Tensor:
        """Return the set of an order: bool ``[..., N]`` with exactly ``min(k, valid)`` True per row."""
        return torch.zeros_like(self.valid).scatter(-1, order, self._counts(order)) | self.forced

    def log_prob(self, order: Tensor) -> Tensor:
        """Return the log-probability of an order, fp32 ``[...]``; 0 in rows without a choice. Cost O(N + k log k)."""
        counts = self._counts(order)
        taken = torch.zeros_like(self.valid).scatter(-1, order, counts)
        picked = self.scores.gather(-1, order).masked_fill(~counts, LOW)
        rest = self.scores.masked_fill(taken | ~self.active, LOW).logsumexp(-1, keepdim=True)
        # Before pick j, the picks j, j+1, ... and the rest remain: a cumulative sum from the end.
        remain = torch.cat([picked, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]
        return torch.where(counts, picked - remain, 0.0).sum(-1)

    def uniform_log_prob(self) -> Tensor:
        """Return ``-log( n! / (n - k)! )``, n the valid positions."""
        n = self.active.sum(-1)
        return torch.lgamma((n - self.k).clamp(min=0) + 1.0) - torch.lgamma(n + 1.0)

    def entropy(self) -> Tensor:
        """Return the entropy of the FIRST pick, ``H(softmax(scores))``, fp32 ``[...]``, in nats.

        The entropy over orders or sets has no cheap closed form. The entropy of the first pick is exact at k = 1, is also
        largest at equal scores, and serves the same purpose: a bonus on it keeps the law from collapsing early.
        """
        logits = self.scores.masked_fill(~self.active, LOW).log_softmax(-1)
        return -torch.where(self.active, logits.exp() * logits, 0.0).sum(-1)

    def _counts(self, order: Tensor) -> Tensor:
        """Mark the entries of an order that are picks: bool, shape of ``order``."""
        places = torch.arange(order.shape[-1], device=order.device)
        return (places < self.k.unsqueeze(-1)) & self.free.unsqueeze(-1)
