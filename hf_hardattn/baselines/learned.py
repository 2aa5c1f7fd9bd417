"""Learned: a small network that predicts the reward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..options import Weight, Width
from . import Baseline


class Learned(Baseline):
    """Predict each example's reward from the mean state of the site's candidates, ``b = w2 gelu(W1 norm(x) + b1) + b2``.

    The network reads the candidates of the choice but never the choice itself, so the gradient stays unbiased. It is trained with
    the squared error of its prediction, which is added to the training loss and does not reach the backbone (the network's input is
    detached). Examples whose reward is NaN or infinite are ignored.

    Args:
        hidden: width of the hidden layer, in [1, 8192]. weight: in [0, 1e6], weight of the squared error in the loss.

    Source: Mnih & Gregor 2014, "Neural Variational Inference and Learning in Belief Networks", arXiv:1402.0030, section 3.1;
    Mnih et al. 2014, "Recurrent Models of Visual Attention", arXiv:1406.6247, equation 3.
    """

    needs_summary = True

    def __init__(self, hidden: Width = 64, weight: Weight = 1.0) -> None:
        super().__init__()
        self.hidden, self.weight = hidden, weight

    def build(self, hidden_size: int) -> None:
        self.weight_in = nn.Parameter(torch.empty(self.hidden, hidden_size))
        self.bias_in = nn.Parameter(torch.empty(self.hidden))
        self.weight_out = nn.Parameter(torch.empty(1, self.hidden))
        self.bias_out = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_in, std=self.weight_in.shape[1] ** -0.5)
        nn.init.zeros_(self.bias_in)
        nn.init.zeros_(self.weight_out)
        nn.init.zeros_(self.bias_out)

    def loss(self, value: Tensor, reward: Tensor) -> Tensor:
        """Mean squared error of the prediction, over the examples whose reward is finite."""
        finite = reward.isfinite()
        errors = (value - reward.where(finite, 0.0)).square().where(finite, 0.0)
        return self.weight * errors.sum() / finite.sum().clamp(min=1)

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return the prediction with its gradient, fp32 ``[B]``; ``reward`` is not used."""
        if summary is None:
            raise TypeError("Learned.forward needs summary [B, D].")
        # A state that is not finite would make the gradient of every weight NaN, even if the loss ignores the example.
        states = functional.rms_norm(summary.where(summary.isfinite(), 0.0), summary.shape[-1:])
        hidden = functional.gelu(functional.linear(states, self.weight_in.float(), self.bias_in.float()))
        return functional.linear(hidden, self.weight_out.float(), self.bias_out.float()).squeeze(-1)
