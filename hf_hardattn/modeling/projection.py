"""The projections of an attention module, by the names of its ``AttentionSpec``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..scorers import Projections
from .spec import AttentionSpec


class AttentionView:
    """An attention module seen through its spec: the same attributes for every family.

    Args:
        module: the stock attention module. spec: the names inside it.
    """

    __slots__ = ("module", "spec")

    def __init__(self, module: Any, spec: AttentionSpec):
        self.module, self.spec = module, spec

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        name = self.spec.scale
        return getattr(self.module, name) if name is not None else getattr(self.module, self.spec.head_size) ** -0.5

    @property
    def dropout(self) -> float:
        """Dropout rate of the weights, 0 in evaluation."""
        if not self.module.training:
            return 0.0
        rate = getattr(self.module, self.spec.dropout)
        return rate.p if isinstance(rate, nn.Dropout) else rate

    def query(self, states: Tensor) -> Tensor:
        """``[B, Q, D]`` to ``[B, H, Q, d]``."""
        return self._project(states, self.spec.query, 0)

    def key(self, states: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, H, N, d]``."""
        return self._project(states, self.spec.key, 1)

    def value(self, states: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, H, N, d]``."""
        return self._project(states, self.spec.value, 2)

    def all(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the same states, by one product where the module has one."""
        if self.spec.fused is None:
            return self.query(states), self.key(states), self.value(states)
        projected = getattr(self.module, self.spec.fused)(states)
        size = getattr(self.module, self.spec.head_size)
        query, key, value = projected.unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def output(self, attended: Tensor) -> Tensor:
        """``[B, Q, H * d]`` to ``[B, Q, D]``."""
        return attended if self.spec.output is None else self.module.get_submodule(self.spec.output)(attended)

    def projections(self, norm: nn.Module | None = None) -> Projections:
        """The projections as a scorer reads them, behind the layer's norm for scorers of the residual stream."""

        def normed(states: Tensor) -> Tensor:
            return states if norm is None else norm(states)

        return Projections(
            query=lambda states: self.query(normed(states)) * self.scale, key=lambda states: self.key(normed(states))
        )

    def _project(self, states: Tensor, name: str, part: int) -> Tensor:
        size = getattr(self.module, self.spec.head_size)
        if self.spec.fused is None:
            return self.module.get_submodule(name)(states).unflatten(-1, (-1, size)).transpose(1, 2)
        fused = self.module.get_submodule(self.spec.fused)
        width = fused.out_features // 3
        rows = slice(part * width, (part + 1) * width)
        if type(fused) is nn.Linear and not fused.weight.is_meta and not hasattr(fused, "_hf_hook"):
            bias = None if fused.bias is None else fused.bias[rows]
            states = nn.functional.linear(states, fused.weight[rows], bias)
        else:
            # an adapter or a hook stands around the projection: call it whole, or its part would be lost
            states = fused(states)[..., rows]
        return states.unflatten(-1, (-1, size)).transpose(1, 2)
