"""Two exact laws over the subsets of ``k`` of ``N`` positions, for every row of a leading shape ``[...]`` at once.

``PlackettLuce``          picks one position after the other, softmax over what remains (Gumbel-top-k draws it).
``ConditionalBernoulli``  p(S) proportional to exp(sum of the scores in S), |S| = k (what SIMPLE differentiates).

They are different laws (total variation about 0.14 on ten normal scores with k = 5), so an unbiased score-function
estimator must draw from the law whose log-probability it uses. Rows with k = 0 or k >= valid count hold no choice: they
keep nothing or everything valid, with log-probability 0, entropy 0 and a gradient that is exactly zero (not rounding
noise, which Adam would scale up).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .polynomials import complement, descend, outside, tree
from .selection import topk_mask

# stands for -inf: exp() of it is 0 all the same, and it has no inf - inf = NaN in a backward pass
LOW = -1e30


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Turn uniform noise into standard Gumbel noise, ``-log(-log(u))``, in fp32.

    Args:
        uniform: fp32, any shape, in [0, 1]; 0 and 1 move to the nearest number inside: the result is in [-4.5, 16.7].

    Source: Gumbel (1954); Maddison et al. 2014, arXiv:1411.0030.
    """
    limits = torch.finfo(torch.float32)
    return -torch.log(-torch.log(uniform.float().clamp(limits.tiny, 1 - limits.eps / 2)))


class SubsetLaw:
    """A law over k-subsets; ``free`` marks the rows that hold a choice, ``active`` their valid positions."""

    def __init__(self, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> None:
        """Set the law up.

        Args:
            scores: fp32 ``[..., N]``, finite, already divided by the temperature.
            k: int64 ``[...]`` (or broadcastable), size of the subset; rows with fewer valid positions keep them all.
            valid: bool, broadcastable to ``scores``; False positions have probability 0.
            slots: upper bound of ``k`` known without reading it (spares a device synchronisation); N by default. A larger
                ``k`` counts as ``slots``, and 0 is allowed: no row then holds a choice.
        """
        n = scores.shape[-1]
        most = n if slots is None else min(slots, n)
        # At least one slot, whatever ``most``: a top-k of none has no k-th score to look up.
        self.slots = max(1, most)
        self.valid = valid.expand_as(scores)
        count = self.valid.sum(-1)
        self.k = torch.minimum(k.expand(scores.shape[:-1]), count).clamp(0, most)
        self.free = (self.k > 0) & (self.k < count)
        self.active = self.valid & self.free.unsqueeze(-1)
        # rows without a choice: all or nothing
        self.forced = self.valid & ((self.k > 0) & ~self.free).unsqueeze(-1)
        self.scores = scores if scores.dtype == torch.float64 else scores.float()  # float64: for exact checks

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a subset and return it with its log-probability, which carries the gradient to the scores.

        Args:
            uniform: fp32 ``[..., N]`` in [0, 1].

        Returns:
            bool ``[..., N]`` with exactly ``min(k, valid)`` True per row, never an invalid one; fp32 ``[...]``.
        """
        outcome = self.outcome(uniform)
        return self.mask_of(outcome), self.log_prob(outcome)

    def explore(self, uniform: Callable[[tuple[int, ...]], Tensor], rate: float) -> tuple[Tensor, Tensor]:
        """Draw from the mixture ``(1 - rate) law + rate uniform law``, row by row, with the mixture's own log-probability.

        So a score function stays unbiased for the mixture it samples, and its gradient stays bounded: where the law gives
        a drawn subset less than the uniform law does, its gradient is damped.

        Args:
            uniform: draws fp32 noise in [0, 1] of a shape. rate: in [0, 1]; 0 is ``draw``.
        """
        shape = tuple(self.scores.shape)
        if rate == 0:
            return self.draw(uniform(shape))
        explores = uniform(shape[:-1]) < rate
        outcome = self.outcome(uniform(shape), explores)
        mask, log_prob, flat = self.mask_of(outcome), self.log_prob(outcome), self.uniform_log_prob()
        if rate < 1:
            flat = torch.logaddexp(log_prob + math.log1p(-rate), flat + math.log(rate))
        return mask, torch.where(self.free, flat, 0.0)

    def outcome(self, uniform: Tensor, flat: Tensor | None = None) -> Tensor:
        """Draw what ``log_prob`` takes: an order or a mask; by the uniform law in rows that are ``flat``."""
        raise NotImplementedError

    def mask_of(self, outcome: Tensor) -> Tensor:
        """Return the set of an outcome: bool ``[..., N]`` with exactly ``min(k, valid)`` True per row."""
        raise NotImplementedError

    def log_prob(self, outcome: Tensor) -> Tensor:
        """Return the log-probability of an outcome, fp32 ``[...]``."""
        raise NotImplementedError

    def uniform_log_prob(self) -> Tensor:
        """Return the log-probability of any outcome were all scores equal, fp32 ``[...]``."""
        raise NotImplementedError

    def entropy(self) -> Tensor:
        """Return an entropy of the law, fp32 ``[...]``, in nats; 0 in rows without a choice."""
        raise NotImplementedError


class PlackettLuce(SubsetLaw):
    """Draw positions one after the other without replacement, each by the softmax over those that remain.

    ``log p(i_1, ..., i_k) = sum_j ( s_{i_j} - logsumexp of the scores not drawn before j )``, the probability of the
    ORDER drawn. As a score function it is unbiased for any function of the set: the set is read off the order.

    Source: Kool, van Hoof & Welling 2019, "Stochastic Beams and Where to Find Them", arXiv:1903.06059, section 3.
    """

    def outcome(self, uniform: Tensor, flat: Tensor | None = None) -> Tensor:
        """Draw an ordered sample by Gumbel-top-k: the ``k`` largest of ``scores + Gumbel noise``, largest first.

        Args:
            uniform: fp32 ``[..., N]`` in [0, 1]. flat: bool ``[...]`` or None; rows in which all scores count as equal.

        Returns:
            int64 ``[..., slots]``; only the first ``k`` places of a row count.
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
        # before pick j remain picks j, j+1, ... and the rest: a cumulative sum from the end
        remain = torch.cat([picked, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]
        return torch.where(counts, picked - remain, 0.0).sum(-1)

    def uniform_log_prob(self) -> Tensor:
        """Return ``-log( n! / (n - k)! )``, n the valid positions."""
        n = self.active.sum(-1)
        return torch.lgamma((n - self.k).clamp(min=0) + 1.0) - torch.lgamma(n + 1.0)

    def entropy(self) -> Tensor:
        """Return the entropy of the FIRST pick, ``H(softmax(scores))``, fp32 ``[...]``, in nats.

        The entropy over orders or sets has no closed form of low cost. The first pick's is exact at k = 1, is likewise
        largest at equal scores, and serves the same purpose: a bonus on it keeps the law from collapsing early.
        """
        logits = self.scores.masked_fill(~self.active, LOW).log_softmax(-1)
        return -torch.where(self.active, logits.exp() * logits, 0.0).sum(-1)

    def _counts(self, order: Tensor) -> Tensor:
        """Mark the places of an order that are picks: bool, shape of ``order``."""
        places = torch.arange(order.shape[-1], device=order.device)
        return (places < self.k.unsqueeze(-1)) & self.free.unsqueeze(-1)


class ConditionalBernoulli(SubsetLaw):
    """Weigh every k-subset of the valid positions by the exponential of its summed scores.

    ``p(S) = exp(sum_{i in S} s_i) / Z_k``, ``Z_k = [x^k] prod_i (1 + e^{s_i} x)``: N independent Bernoullis, given that
    k of them are on.

    The coefficient comes from a balanced tree of polynomial products (``polynomials``): log2(N) vectorised levels, cut
    at power k. The polynomials hold probabilities, not weights: one number added to all scores of a row leaves p(S) as
    it is, and with the number that makes the expected count k (``_tilt``) a coefficient is the probability of a count,
    the one wanted is near the mode, and what underflows in fp32 is below 1e-36 of it. So linear space is stable
    (N = 4096, k = 1024, scores of +-1e4) without an exponential per term; all terms are positive, so nothing cancels.

    Gradient and cost: all results are differentiable, any number of times. O(N k) multiplications, of which nothing is kept
    but the polynomials, O(N log k) numbers a row.

    Source: Ahmed et al. 2023, "SIMPLE", arXiv:2210.01941 (log Z_k, marginals as its gradient, exact sampling);
    Chen & Liu 1997, "Statistical applications of the Poisson-binomial and conditional Bernoulli distributions",
    Statistica Sinica 7 (tilting).
    """

    def __new__(cls, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> ConditionalBernoulli:
        """One position at most needs no tree."""
        return super().__new__(Categorical if slots is not None and slots <= 1 else cls)

    def __init__(self, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> None:
        """Set the law up and multiply its tree; same arguments as ``PlackettLuce``."""
        super().__init__(scores, k, valid, slots)
        self.k_free = torch.where(self.free, self.k, 0)
        self.pivot, self.shift = _tilt(self.scores.detach(), self.k_free, self.active, self.slots)
        # two steps: the first subtraction is exact near the pivot, however large the scores are
        self.tilted = torch.where(self.active, self.scores - self.pivot + self.shift, 0.0)
        # Only the "on" weight carries the gradient, as a factor e^(s - s0) that is 1: the tree is then Z_k times a
        # constant, and its log-derivative is the marginal itself instead of a difference of two numbers near 1.
        value = self.tilted.detach()
        on = torch.where(self.active, value.sigmoid(), 0.0) * (self.tilted - value).exp()
        off = torch.where(self.active, (-value).sigmoid(), 1.0)
        self.on, self.levels = on, tree(torch.stack([off.movedim(-1, 0), on.movedim(-1, 0)]), self.slots)
        left, right = self.levels[-1].unbind(1)
        self.weight = (left * complement(right, self.k_free)).sum(0).clamp(min=torch.finfo(torch.float32).tiny)

    def log_z(self) -> Tensor:
        """Return ``log sum_{|S| = k} exp(sum_{i in S} s_i)``, fp32 ``[...]``, with gradient ``marginals``."""
        untilt = self.k_free * (self.pivot - self.shift).squeeze(-1)
        return self.weight.log() + self._softplus().sum(-1) + untilt + (self.forced * self.scores).sum(-1)

    def log_prob(self, mask: Tensor) -> Tensor:
        """Return ``sum_{i in S} s_i - log Z_k`` of a k-subset S, fp32 ``[...]``; 0 in rows without a choice.

        Args:
            mask: bool ``[..., N]`` with ``k`` True per row, none of them invalid (not checked).
        """
        # term by term, so that large scores cancel before they are summed
        return (mask * self.tilted - self._softplus()).sum(-1) - self.weight.log()

    def marginals(self) -> Tensor:
        """Return ``m_i = P(i in S) = d log Z_k / d s_i``, fp32 ``[..., N]`` in [0, 1], summing to ``min(k, valid)``.

        Gradient: exact, the covariance of the law, by plain autograd through this top-down pass of the tree (no
        autograd call inside, so it also works under no_grad and gradient checkpointing).
        """
        outer = outside(self.levels, self.k_free)[1, : self.on.shape[-1]] / self.weight
        return outer.movedim(0, -1) * self.on + self.forced

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw a subset exactly: split the count k between the two halves of the row, and so on down the tree.

        Args:
            uniform: fp32 ``[..., N]`` in [0, 1]; N - 1 of them are used.

        Returns:
            bool ``[..., N]`` with exactly ``min(k, valid)`` True per row, never an invalid one.
        """
        on = descend(self.levels, self.k_free, uniform.movedim(-1, 0)).movedim(0, -1) > 0
        return on | self.forced

    def outcome(self, uniform: Tensor, flat: Tensor | None = None) -> Tensor:
        """``sample``; any k positions alike in rows that are ``flat``, bool ``[...]``."""
        mask = self.sample(uniform)
        return (
            mask
            if flat is None
            else mask.where(~flat.unsqueeze(-1), topk_mask(uniform, self.k, self.valid, self.slots))
        )

    def mask_of(self, outcome: Tensor) -> Tensor:
        """An outcome is a mask."""
        return outcome

    def uniform_log_prob(self) -> Tensor:
        """Return ``-log C(n, k)``, n the valid positions."""
        n, k = self.active.sum(-1), self.k
        return torch.lgamma(k + 1.0) + torch.lgamma((n - k).clamp(min=0) + 1.0) - torch.lgamma(n + 1.0)

    def entropy(self) -> Tensor:
        """Return the entropy ``log Z_k - sum_i m_i s_i``, exact, fp32 ``[...]``, in nats."""
        # log_prob is linear in the mask, so its expectation is its value at the marginals
        return -self.log_prob(self.marginals())

    def _softplus(self) -> Tensor:
        """Return ``-log`` of the "off" probabilities, fp32 ``[..., N]``, a constant of the law (see ``__init__``)."""
        return torch.where(self.active, functional.softplus(self.tilted.detach()), 0.0)


class Categorical(ConditionalBernoulli):
    """The same law where a row keeps one position at most (``slots=1``): a softmax. O(N)."""

    def __init__(self, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> None:
        SubsetLaw.__init__(self, scores, k, valid, slots)
        masked = self.scores.masked_fill(~self.active, LOW)
        # the largest goes first: a sum in which it stays would round the differences of large scores
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

    The pivot is the k-th largest score; from there the shift lies within +-20 for N < 1e8, whatever the scores. 14
    rounds of bisection bring it to 0.0013, so the expected count is within 0.05 standard deviations of k at N = 4096.
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
