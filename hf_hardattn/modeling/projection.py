"""The projections of an attention module, found by the names in its ``AttentionSpec``."""

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
    """An attention module seen through its spec, with the same attributes for every family.

    Queries and keys are not rotated by a rotary embedding, because scorers read them without their positions.

    Args:
        module: the stock attention module. spec: the names inside it.
        tables: tables of the rotary embedding for all rows that are read; None if the family has none.
    """

    __slots__ = ("module", "spec", "tables")

    def __init__(self, module: Any, spec: AttentionSpec, tables: Tables | None = None):
        self.module, self.spec, self.tables = module, spec, tables

    @property
    def scale(self) -> float:
        """The factor of the logits."""
        name = self.spec.scale
        return getattr(self.module, name) if name is not None else getattr(self.module, self.spec.head_size) ** -0.5

    @property
    def dropout(self) -> float:
        """The dropout rate of the weights, 0 in evaluation."""
        if not self.module.training:
            return 0.0
        rate = getattr(self.module, self.spec.dropout)
        return rate.p if isinstance(rate, nn.Dropout) else rate

    def query(self, states: Tensor) -> Tensor:
        """Project ``[B, Q, D]`` to queries ``[B, H, Q, d]``."""
        return self._normed(self._project(states, self.spec.query, 0), self.spec.query_norm)

    def key(self, states: Tensor) -> Tensor:
        """Project ``[B, N, D]`` to keys ``[B, H, N, d]``."""
        return self._normed(self._project(states, self.spec.key, 1), self.spec.key_norm)

    def value(self, states: Tensor) -> Tensor:
        """Project ``[B, N, D]`` to values ``[B, H, N, d]``."""
        return self._project(states, self.spec.value, 2)

    def all(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the same states to query, key and value, with one matrix product if the module has a fused projection."""
        if self.spec.fused is None:
            return self.query(states), self.key(states), self.value(states)
        projected = getattr(self.module, self.spec.fused)(states)
        size = getattr(self.module, self.spec.head_size)
        query, key, value = projected.unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4)
        return self._normed(query, self.spec.query_norm), self._normed(key, self.spec.key_norm), value

    def output(self, attended: Tensor) -> Tensor:
        """Project the attended values ``[B, Q, H * d]`` to ``[B, Q, D]``."""
        for name in (self.spec.output, self.spec.output_dropout):
            attended = attended if name is None else attrgetter(name)(self.module)(attended)
        return attended

    def projections(self, norm: nn.Module | None = None) -> Projections:
        """Return the projections as a scorer reads them, after the layer's norm for scorers of the residual stream."""

        def normed(states: Tensor) -> Tensor:
            return states if norm is None else norm(states)

        return Projections(
            query=lambda states: self.query(normed(states)) * self.scale, key=lambda states: self.key(normed(states))
        )

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of a self-attention among all rows: ``[B, N, D]`` to ``[B, H, N, N]``."""
        query, key = (self.rotated(x, self.tables) for x in (self.query(states), self.key(states)))
        groups = query.shape[1] // key.shape[1]
        key = key if groups == 1 else key.repeat_interleave(groups, 1)
        return query @ key.transpose(-1, -2) * self.scale

    def rotated(self, states: Tensor, tables: Tables | None) -> Tensor:
        """Rotate queries or keys ``[B, H, N, d]`` by their positions, if the family has a rotary embedding."""
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
            # an adapter or a hook surrounds the projection: call it as a whole, or its part would be lost
            states = fused(states)[..., rows]
        return states.view(*states.shape[:-1], -1, size).transpose(1, 2)


def projections_of(layer: nn.Module, plan: LayerPlan) -> Callable[[], Projections]:
    """Return a function that makes the projections of a layer's self-attention after its norm, for scorers that need them."""

    def make() -> Projections:
        norm = None if plan.norm is None else attrgetter(plan.norm)(layer)
        return AttentionView(attrgetter(plan.attention)(layer), plan.attention_spec).projections(norm)

    return make


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is exactly of ``kind``, without adapter, hook or other forward, so that its weights determine it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # Accelerate's forward only moves weights
    replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    return type(module) is kind and not any(hooks) and not replaced
