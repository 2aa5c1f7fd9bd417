"""The inference network of variational attention, whose scores depend on the answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Posterior(nn.Module):
    """Score each position by what the target says about it, in addition to the score of the prior:
    ``q_n = s_n + (Wt norm(y)) . (Wk norm(x_n)) / sqrt(d)``, with the target's neighbours mixed in by a small convolution.

    It starts at the prior (``Wt = 0``) and is used only in training.

    Args:
        hidden_size: D of the candidates. target_size: Dt of the target's states.

    Source: Deng et al. 2018, "Latent Alignment and Variational Attention", arXiv:1807.03756, section 4.
    """

    def __init__(self, hidden_size: int, target_size: int, size: int = 64) -> None:
        super().__init__()
        self.hidden_size, self.target_size, self.size = hidden_size, target_size, size
        self.key_weight = nn.Parameter(torch.empty(size, hidden_size))
        self.target_weight = nn.Parameter(torch.empty(size, target_size))
        self.mix = nn.Parameter(torch.empty(target_size, 1, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key_weight, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.target_weight)
        nn.init.zeros_(self.mix)

    def keys(self, states: Tensor) -> Tensor:
        """Map states ``[B, N, D]`` to keys, fp32 ``[B, N, d]``."""
        states = functional.rms_norm(states.float(), (self.hidden_size,))
        return functional.linear(states, self.key_weight.float())

    def forward(self, keys: Tensor, target: Tensor, queries: int) -> Tensor:
        """Return what the target adds to the scores, fp32 ``[B, 1, Q, N]``; Q = 1 if the queries are not the target's positions.

        Args:
            keys: ``[B, N, d]``.
            target: ``[B, T, Dt]``, all-zero rows where there is none (padding).
            queries: number of queries that choose for themselves; if it is T, each query reads its own part of the target.
        """
        present = (target != 0).any(-1, keepdim=True)
        states = functional.rms_norm(target.float(), (self.target_size,)) * present
        near = functional.conv1d(states.transpose(1, 2), self.mix.float(), padding=1, groups=self.target_size)
        states = states + near.transpose(1, 2)
        if states.shape[1] != queries:
            states = states.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        wanted = functional.linear(states, self.target_weight.float())
        return (wanted @ keys.transpose(1, 2) * self.size**-0.5).unsqueeze(1)
