"""The projections of an attention module, by the names of its ``AttentionSpec``."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..scorers import Projections
from .plan import LayerPlan
from .rotary import Tables, rotate
from .spec import AttentionSpec


class AttentionView:
    """An attention module seen through its spec: the same attributes for every family.

    Queries and keys are not turned by a rotary embedding: scorers read them without their positions.

    Args:
        module: the stock attention module. spec: the names inside it.
        tables: of the rotary embedding, for all rows that are read; None where the family has none.
    """

    __slots__ = ("module", "spec", "tables")

    def __init__(self, module: Any, spec: AttentionSpec, tables: Tables | None = None):
        self.module, self.spec, self.tables = module, spec, tables

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
        return self._normed(self._project(states, self.spec.query, 0), self.spec.query_norm)

    def key(self, states: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, H, N, d]``."""
        return self._normed(self._project(states, self.spec.key, 1), self.spec.key_norm)

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
        return self._normed(query, self.spec.query_norm), self._normed(key, self.spec.key_norm), value

    def output(self, attended: Tensor) -> Tensor:
        """``[B, Q, H * d]`` to ``[B, Q, D]``."""
        for name in (self.spec.output, self.spec.output_dropout):
            attended = attended if name is None else attrgetter(name)(self.module)(attended)
        return attended

    def projections(self, norm: nn.Module | None = None) -> Projections:
        """The projections as a scorer reads them, behind the layer's norm for scorers of the residual stream."""

        def normed(states: Tensor) -> Tensor:
            return states if norm is None else norm(states)

        return Projections(
            query=lambda states: self.query(normed(states)) * self.scale, key=lambda states: self.key(normed(states))
        )

    def logits(self, states: Tensor) -> Tensor:
        """The logits of a self-attention among all rows ``[B, N, D]``, ``[B, H, N, N]``."""
        query, key = (self.rotated(x, self.tables) for x in (self.query(states), self.key(states)))
        groups = query.shape[1] // key.shape[1]
        key = key if groups == 1 else key.repeat_interleave(groups, 1)
        return query @ key.transpose(-1, -2) * self.scale

    def rotated(self, states: Tensor, tables: Tables | None) -> Tensor:
        """Queries or keys ``[B, H, N, d]`` turned by their positions, where the family has a rotary embedding."""
        if tables is None:
            return states
        return rotate(self.module, self.spec.rotary_function, states, tables)

    def _normed(self, states: Tensor, name: str | None) -> Tensor:
        return states if name is None else attrgetter(name)(self.module)(states)

    def _project(self, states: Tensor, name: str, part: int) -> Tensor:
        size = getattr(self.module, self.spec.head_size)
        if self.spec.fused is None:
            states = attrgetter(name)(self.module)(states)
            return states.view(*states.shape[:-1], -1, size).transpose(1, 2)
        fused = attrgetter(self.spec.fused)(self.module)
        width = fused.out_features // 3
        rows = slice(part * width, (part + 1) * width)
        if is_bare(fused, nn.Linear) and not hasattr(fused, "_hf_hook"):
            bias = None if fused.bias is None else fused.bias[rows]
            states = nn.functional.linear(states, fused.weight[rows], bias)
        else:
            # an adapter or a hook stands around the projection: call it whole, or its part would be lost
            states = fused(states)[..., rows]
        return states.view(*states.shape[:-1], -1, size).transpose(1, 2)


def projections_of(layer: nn.Module, plan: LayerPlan) -> Callable[[], Projections]:
    """The projections of a layer's self-attention behind its norm, made where a scorer asks for them."""

    def make() -> Projections:
        norm = None if plan.norm is None else attrgetter(plan.norm)(layer)
        return AttentionView(attrgetter(plan.attention)(layer), plan.attention_spec).projections(norm)

    return make


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of ``kind`` and no adapter, hook or other forward has a part in it, so that its weights tell all."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # Accelerate's forward moves weights and nothing else
    replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    return type(module) is kind and not any(hooks) and not replaced
