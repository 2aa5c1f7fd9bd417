"""I-MLE: compare the choice with the one that the scores would give after a step against the loss gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..distributions import SubsetLaw, gumbel_noise
from ..functional.topk import topk_mask
from ..options import Positive
from . import Choice, Estimator, Sampling

TERMS, TRIES = 10, 4  # terms of a sum-of-gamma variable; tries of a rejection sampler that accepts 95 %
RATE, DECAY, TARGET = 0.01, 0.9, 1.0  # parameters of the adaptive step
LEAST, MOST = 1e-4, 1e4  # limits of beta, which would grow for ever if no step changed the choice


class Imle(Estimator):
    """Keep the top k of noisy scores, and compare it with the top k after a step against the loss's gradient v.

    ``z = topk(s + T e)``, ``g = (z - topk(s + T e - lambda v)) / lambda``: a finite difference of the sampler, with the same
    noise on both sides. Positions that the step neither adds nor removes get no gradient.

    With a small lambda the gradient is noisy and mostly 0; with a large lambda it is biased. Lambda has the unit of ``score / v``,
    and v shrinks with the size of the batch and grows with a loss scale (fp16), so a fixed lambda has to be tuned. ``adaptive``
    (AIMLE) uses ``lambda = beta |s + T e| / |v|`` over the batch and adjusts beta until ``g`` has one nonzero entry per row on
    average: up by 1 % if there are fewer, else down. (The paper adds a constant instead; a factor keeps beta positive at any scale.
    Scores are taken relative to the mean of their row.)

    Args:
        strength: in [1e-6, 1e6]; lambda at temperature 1, or the first beta if adaptive.
        adaptive: adjust the size of the step during training.
        noise: ``gumbel``, or ``sum_of_gamma``, of which k add up to a Gumbel variable.

    Attributes:
        state: fp32 ``[2]``, beta and the running mean of nonzero entries, or None before the first backward pass. It is not in the
            state dict, because it describes the run and not the model. Each rank has its own.

    Gradient and cost: biased. The backward pass runs one more top-k and adjusts beta (``torch.compile`` breaks the graph
    there). The backward temperature scales a fixed lambda.

    Raises:
        HardAttentionError: strength out of range; unknown noise.

    Source: Niepert, Minervini & Franceschi 2021, "Implicit MLE", arXiv:2106.01798, algorithm 1, and theorem 1 (noise);
    Minervini, Franceschi & Niepert 2023, "Adaptive Perturbation-Based Gradient Estimation for Discrete Latent Variable
    Models", arXiv:2209.04862.
    """

    biased = True
    needs = ("gates",)
    run_state = ("state",)
    source = "Niepert et al. 2021, arXiv:2106.01798; adaptive: Minervini et al. 2023, arXiv:2209.04862"

    def __init__(
        self, strength: Positive = 1.0, adaptive: bool = True, noise: Literal["gumbel", "sum_of_gamma"] = "gumbel"
    ) -> None:
        super().__init__()
        self.strength, self.adaptive, self.noise = strength, adaptive, noise
        self.state: Tensor | None = None

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k of the noisy scores; the backward pass chooses again."""
        law, shape = SubsetLaw(scores, k, valid, slots), tuple(scores.shape)
        if self.noise == "gumbel":
            noise = gumbel_noise(sampling.uniform(shape))
        else:
            noise = sum_of_gamma(law.k.clamp(min=1).unsqueeze(-1), shape, sampling)
        noisy = law.scores + sampling.temperature * noise
        mask = topk_mask(noisy.detach(), law.k, law.valid, law.slots)
        return Choice(mask, gates=_Step.apply(noisy, mask, law, self, self.strength * sampling.backward))

    @torch.no_grad()
    def step(self, noisy: Tensor, v: Tensor, active: Tensor) -> Tensor:
        """Return the lambda of an adaptive step, fp32 scalar."""
        self.state = noisy.new_tensor([self.strength, TARGET]) if self.state is None else self.state.to(noisy)
        count = active.sum(-1, keepdim=True).clamp(min=1)
        centred = torch.where(active, noisy - torch.where(active, noisy, 0.0).sum(-1, keepdim=True) / count, 0.0)
        return (self.state[0] * centred.norm() / v.norm().clamp(min=1e-20)).clamp(min=1e-20)

    @torch.no_grad()
    def adapt(self, change: Tensor, free: Tensor) -> None:
        """Adjust beta after a step that made this ``change`` to the choice; a batch without a choice adjusts nothing."""
        if self.state is not None:
            nonzero = (change != 0).sum() / free.sum().clamp(min=1)
            mean = DECAY * self.state[1] + (1 - DECAY) * nonzero
            beta = self.state[0] * torch.where(mean < TARGET, 1 + RATE, 1 / (1 + RATE))
            self.state = torch.where(free.any(), torch.stack([beta.clamp(LEAST, MOST), mean]), self.state)


class _Step(torch.autograd.Function):
    """Forward: the mask as numbers. Backward: the difference that one step makes."""

    @staticmethod
    def forward(ctx: Any, noisy: Tensor, mask: Tensor, law: SubsetLaw, owner: Imle, step: float | Tensor) -> Tensor:
        ctx.save_for_backward(noisy, mask)
        ctx.law, ctx.owner, ctx.step = law, owner, step
        return mask.to(noisy.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        noisy, mask = ctx.saved_tensors
        law, v = ctx.law, torch.where(ctx.law.active, grads[0], 0.0)
        step = ctx.owner.step(noisy, v, law.active) if ctx.owner.adaptive else ctx.step
        change = mask.to(v) - topk_mask(noisy - step * v, law.k, law.valid, law.slots).to(v)
        if ctx.owner.adaptive:
            ctx.owner.adapt(change, law.free)
        return change / step, None, None, None, None


def sum_of_gamma(k: Tensor, shape: tuple[int, ...], sampling: Sampling) -> Tensor:
    """Draw ``sum_{i <= 10} Gamma(1/k) / i - log(10) / k``, fp32; k of these add up to approximately a Gumbel variable.

    Args:
        k: int64 >= 1, broadcastable to ``shape``.

    Source: Niepert et al. 2021, theorem 1. The gamma variables: Marsaglia & Tsang 2000, ``Gamma(a) = Gamma(a + 1) U^{1/a}``;
    after 4 rejections (5 in a million) the mode is used instead, which avoids a device synchronisation.
    """
    terms = torch.arange(1, TERMS + 1, device=k.device, dtype=torch.float32).view(-1, *[1] * len(shape))
    size, limits = (TERMS, *shape), torch.finfo(torch.float32)

    def uniform() -> Tensor:
        return sampling.uniform(size).clamp(limits.tiny, 1 - limits.eps / 2)

    d = 1.0 / k + 2 / 3
    gamma, done = d.expand(size), torch.zeros(size, dtype=torch.bool, device=k.device)
    for _ in range(TRIES):
        x = torch.erfinv(2 * uniform() - 1) * 2**0.5
        cube = (1 + x / (9 * d).sqrt()) ** 3
        fits = (cube > 0) & (uniform().log() < x * x / 2 + d * (1 - cube + cube.clamp(min=limits.tiny).log()))
        gamma = torch.where(fits & ~done, d * cube, gamma)
        done = done | fits
    return (gamma * (uniform().log() * k).exp() / terms).sum(0) - torch.log(terms[-1]) / k
