"""Selection in several glimpses: those made so far decide where the next one goes."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from ..options import Range, Weight
from . import Projections, Sequential


class Recurrent(Sequential):
    """Score the remaining positions from a recurrent state: ``s_n = (Wq h_t) . (Wk norm(x_n)) / sqrt(d)``, then
    ``h_{t+1} = GRU(mean of the glimpse's keys, h_t)``; ``h_0`` is learned.

    The budget is spread evenly over the glimpses, and no position is selected twice. One choice serves all queries of a row.

    Args:
        size: d, width of the keys and of the state, in [1, 4096].
        glimpses: T, the largest number of glimpses, in [1, 4096]; with a budget below T, there is one glimpse for each position.
        halting_cost: number in [0, 1e6]: the model learns to stop early, and a full set of glimpses costs this much (in units of the
            loss, in proportion to the expected number of glimpses). None always takes T glimpses.
        monotonic: a glimpse starts after the last position of the previous one.

    Gradient and cost: the gradient also passes through the state (back-propagation through the glimpses); N d multiplications per
    glimpse.

    Source: Mnih et al. 2014, "Recurrent Models of Visual Attention", arXiv:1406.6247, section 3.1; halting: Graves 2016,
    arXiv:1603.08983, with a hard stop in place of a mixture.
    """

    needs_positions = False

    def __init__(
        self,
        hidden_size: int,
        query_size: int,
        heads: int = 1,
        size: Annotated[int, Range(1, 4096, "It is the width of a layer.")] = 32,
        glimpses: Annotated[int, Range(1, 4096, "A recurrent scorer takes at least one glimpse.")] = 4,
        halting_cost: Weight | None = None,
        monotonic: bool = False,
    ):
        super().__init__(hidden_size, query_size, heads)
        self.size = self.features = size
        self.glimpses, self.halting_cost, self.monotonic = glimpses, halting_cost, monotonic
        self.key_weight = nn.Parameter(torch.empty(heads * size, hidden_size))
        self.query_weight = nn.Parameter(torch.empty(size, size))
        self.initial = nn.Parameter(torch.empty(heads, size))
        self.input_weight = nn.Parameter(torch.empty(3 * size, size))
        self.input_bias = nn.Parameter(torch.empty(3 * size))
        self.state_weight = nn.Parameter(torch.empty(3 * size, size))
        self.state_bias = nn.Parameter(torch.empty(3 * size))
        if self.halts:
            self.halt_weight = nn.Parameter(torch.empty(1, size))
            self.halt_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key_weight, std=self.hidden_size**-0.5)
        for weight in (self.query_weight, self.input_weight, self.state_weight):
            nn.init.normal_(weight, std=self.size**-0.5)
        nn.init.normal_(self.initial, std=0.1)  # near-uniform first scores
        for bias in (self.input_bias, self.state_bias):
            nn.init.zeros_(bias)
        if self.halts:
            nn.init.zeros_(self.halt_weight)
            nn.init.constant_(self.halt_bias, 2.0)  # initially it rarely stops; stopping has to be learned

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        states = nn.functional.rms_norm(states.float(), (self.hidden_size,))
        keys = nn.functional.linear(states, self.key_weight.float())
        return keys.unflatten(-1, (self.heads, self.size)).transpose(1, 2)

    def start(self, features: Tensor) -> Tensor:
        return self.initial.float().expand(features.shape[0], -1, -1)

    def look(self, features: Tensor, state: Tensor) -> Tensor:
        query = nn.functional.linear(state, self.query_weight.float())
        return (features @ query.unsqueeze(-1) * self.size**-0.5).transpose(-1, -2)

    def see(self, state: Tensor, seen: Tensor) -> Tensor:
        given = nn.functional.linear(seen, self.input_weight.float(), self.input_bias.float()).chunk(3, -1)
        held = nn.functional.linear(state, self.state_weight.float(), self.state_bias.float()).chunk(3, -1)
        reset, update = (given[0] + held[0]).sigmoid(), (given[1] + held[1]).sigmoid()
        return (1 - update) * (given[2] + reset * held[2]).tanh() + update * state

    def go_on(self, state: Tensor) -> Tensor:
        return nn.functional.linear(state, self.halt_weight.float(), self.halt_bias.float())
