"""The conditional Bernoulli distribution: independent positions, given that exactly k are kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..functional.topk import topk_mask
from .polynomial_tree import complement, descend, outside, tree
from .subset import LOW, SubsetLaw, gumbel_noise


class ConditionalBernoulli(SubsetLaw):
    """Weigh every k-subset of the valid positions by the exponential of its summed scores.

    ``p(S) = exp(sum_{i in S} s_i) / Z_k``, ``Z_k = [x^k] prod_i (1 + e^{s_i} x)``: N independent Bernoullis, given that
    k of them are on.

    The coefficient comes from a balanced tree of polynomial products (``polynomial_tree``): log2(N) vectorised levels, cut
    off at power k. The polynomials hold probabilities instead of weights. Adding one number to all scores of a row does not change
    p(S). With the number that makes the expected count k (``_tilt``), each coefficient is the probability of a count, the required
    one is near the mode, and anything that underflows in fp32 is below 1e-36 of it. Linear space is therefore stable
    (N = 4096, k = 1024, scores of +-1e4) without an exponential per term; all terms are positive, so nothing cancels.

    Gradient and cost: all results are differentiable, any number of times. There are O(N k) multiplications, but only the
    polynomials are kept for the backward pass, O(N log k) numbers per row.

    Source: Ahmed et al. 2023, "SIMPLE", arXiv:2210.01941 (log Z_k, marginals as its gradient, exact sampling);
    Chen & Liu 1997, "Statistical applications of the Poisson-binomial and conditional Bernoulli distributions",
    Statistica Sinica 7 (tilting).
    """

    def __new__(cls, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> ConditionalBernoulli:
        """Return a ``Categorical`` if rows keep one position at most, since this needs no tree."""
        return super().__new__(Categorical if slots is not None and slots <= 1 else cls)

    def __init__(self, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> None:
        """Set up the law and multiply its tree; the arguments are those of ``PlackettLuce``."""
        super().__init__(scores, k, valid, slots)
        self.k_free = torch.where(self.free, self.k, 0)
        self.pivot, self.shift = _tilt(self.scores.detach(), self.k_free, self.active, self.slots)
        # Two steps: the first subtraction is exact near the pivot, however large the scores are.
        self.tilted = torch.where(self.active, self.scores - self.pivot + self.shift, 0.0)
        # Only the "on" weight carries the gradient, as a factor e^(s - s0) whose value is 1. The tree is then Z_k times a
        # constant, and its log-derivative is the marginal itself instead of a difference of two numbers near 1.
        value = self.tilted.detach()
        on = torch.where(self.active, value.sigmoid(), 0.0) * (self.tilted - value).exp()
        off = torch.where(self.active, (-value).sigmoid(), 1.0)
        self.on, self.levels = on, tree(torch.stack([off.movedim(-1, 0), on.movedim(-1, 0)]), self.slots)
        left, right = self.levels[-1].unbind(1)
        self.weight = (left * complement(right, self.k_free)).sum(0).clamp(min=torch.finfo(torch.float32).tiny)

    def log_z(self) -> Tensor:
        """Return ``log sum_{|S| = k} exp(sum_{i in S} s_i)``, fp32 ``[...]``; its gradient is ``marginals``."""
        untilt = self.k_free * (self.pivot - self.shift).squeeze(-1)
        return self.weight.log() + self._softplus().sum(-1) + untilt + (self.forced * self.scores).sum(-1)

    def log_prob(self, mask: Tensor) -> Tensor:
        """Return ``sum_{i in S} s_i - log Z_k`` of a k-subset S, fp32 ``[...]``; 0 in rows without a choice.

        Args:
            mask: bool ``[..., N]`` with ``k`` True per row, all at valid positions (not checked).
        """
        # Subtracted term by term, so that large scores cancel before they are summed.
        return (mask * self.tilted - self._softplus()).sum(-1) - self.weight.log()

    def marginals(self) -> Tensor:
        """Return ``m_i = P(i in S) = d log Z_k / d s_i``, fp32 ``[..., N]`` in [0, 1], summing to ``min(k, valid)``.

        Gradient: exact, the covariance of the law, by plain autograd through this top-down pass of the tree. There is no
        autograd call inside, so it also works under no_grad and gradient checkpointing.
        """
        outer = outside(self.levels, self.k_free)[1, : self.on.shape[-1]] / self.weight
        return outer.movedim(0, -1) * self.on + self.forced

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw an exact sample: split the count k between the two halves of the row, and so on down the tree.

        Args:
            uniform: fp32 ``[..., N]`` in [0, 1]; N - 1 of them are used.

        Returns:
            bool ``[..., N]`` with exactly ``min(k, valid)`` True per row, all at valid positions.
        """
        on = descend(self.levels, self.k_free, uniform.movedim(-1, 0)).movedim(0, -1) > 0
        # In this order, the mask has the memory layout of the scores and not of the tree, so that later operations round alike.
        return self.forced | on

    def outcome(self, uniform: Tensor, flat: Tensor | None = None) -> Tensor:
        """Draw like ``sample``; in rows where ``flat``, bool ``[...]``, is True, all k-subsets are equally likely."""
        mask = self.sample(uniform)
        return (
            mask
            if flat is None
            else mask.where(~flat.unsqueeze(-1), topk_mask(uniform, self.k, self.valid, self.slots))
        )

    def mask_of(self, outcome: Tensor) -> Tensor:
        """Return ``outcome``, which already is a mask."""
        return outcome

    def uniform_log_prob(self) -> Tensor:
        """Return ``-log C(n, k)``, n the valid positions."""
        n, k = self.active.sum(-1), self.k
        return torch.lgamma(k + 1.0) + torch.lgamma((n - k).clamp(min=0) + 1.0) - torch.lgamma(n + 1.0)

    def entropy(self) -> Tensor:
        """Return the entropy ``log Z_k - sum_i m_i s_i``, exact, fp32 ``[...]``, in nats."""
        # log_prob is linear in the mask, so its expectation is its value at the marginals.
        return -self.log_prob(self.marginals())

    def _softplus(self) -> Tensor:
        """Return ``-log`` of the "off" probabilities, fp32 ``[..., N]``, a constant of the law (see ``__init__``)."""
        return torch.where(self.active, functional.softplus(self.tilted.detach()), 0.0)


class Categorical(ConditionalBernoulli):
    """The same law for rows that keep one position at most (``slots=1``): a softmax. O(N)."""

    def __init__(self, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> None:
        SubsetLaw.__init__(self, scores, k, valid, slots)
        masked = self.scores.masked_fill(~self.active, LOW)
        # Subtract the largest score first: without this, the differences of large scores would be rounded.
        largest = masked.detach().amax(-1, keepdim=True)
        log_sum = (masked - largest).logsumexp(-1, keepdim=True)
        self.log_share, self.total = masked - largest - log_sum, (largest + log_sum).squeeze(-1)

    def log_z(self) -> Tensor:
        return torch.where(self.free, self.total, (self.forced * self.scores).sum(-1))

    def log_prob(self, mask: Tensor) -> Tensor:
        return torch.where(self.active, mask * self.log_share, 0.0).sum(-1)

    def marginals(self) -> Tensor:
        return torch.where(self.active, self.log_share.exp(), 0.0) + self.forced

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw by Gumbel-max: bool ``[..., N]``; ``uniform``: fp32 of that shape, in [0, 1]."""
        noisy = (self.log_share.detach() + gumbel_noise(uniform)).masked_fill(~self.active, LOW)
        return (
            torch.zeros_like(self.valid).scatter(-1, noisy.argmax(-1, keepdim=True), self.free.unsqueeze(-1))
            | self.forced
        )


@torch.no_grad()
def _tilt(scores: Tensor, k: Tensor, active: Tensor, slots: int, rounds: int = 14) -> tuple[Tensor, Tensor]:
    """Find ``pivot`` and ``shift``, fp32 ``[..., 1]``, so that ``sigmoid(scores - pivot + shift)`` sums to about ``k``.

    The pivot is the k-th largest score. Relative to it, the shift lies within +-20 for N < 1e8, whatever the scores. 14 rounds
    of bisection determine it to 0.0013, so the expected count is within 0.05 standard deviations of k at N = 4096.
    """
    masked = scores.masked_fill(~active, LOW)
    pivot = masked.topk(slots, dim=-1).values.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1))
    pivot = torch.where(active.any(-1, keepdim=True), pivot, 0.0)
    masked, shift, step = masked - pivot, torch.zeros_like(pivot), 10.0
    for _ in range(rounds):
        expected = (masked + shift).sigmoid().sum(-1, keepdim=True)
        shift = torch.where(expected < k.unsqueeze(-1), shift + step, shift - step)
        step /= 2
    return pivot, shift
