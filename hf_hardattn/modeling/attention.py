"""The attention forward of hard models: one for every family, by the names of its ``AttentionSpec``.

It takes over only when the layer hands it an ``AttentionInput``; otherwise the stock forward runs.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import HardAttentionError
from ..functional import position_bias as distances
from ..functional.attention import (
    attend,
    attend_by_parts,
    attend_packed,
    fits,
    gated_attend,
    keep_columns,
    keep_heads,
    keep_rows,
)
from ..functional.varlen import Packing
from .arguments import parameter_names
from .cache import CacheLayer
from .masks import additive, as_allowed, combine, gather_keys, padding_mask
from .projection import AttentionView
from .spec import AttentionSpec
from .state import AttentionInput, KeySubset

PLAN = "hard_attention_plan"


@dataclass
class AttentionPlan:
    """What an attention module has to do; plain data on the module.

    Attributes:
        spec: the names inside it. names: parameters of its forward. layer: its layer's index.
        cross: it reads another tower. stock: a forward that somebody had put on the module before, or None.
    """

    spec: AttentionSpec
    names: tuple[str, ...]
    layer: int
    cross: bool
    stock: Callable[..., Any] | None = None


def is_softmax(implementation: str) -> bool:
    """Whether an implementation is known to compute softmax attention, so that another way to compute it may take its place."""
    return implementation in ("eager", "sdpa", "flex_attention") or implementation.startswith("flash_attention")


def refuse_per_query(implementation: str, spec: AttentionSpec, site: str) -> None:
    """Refuse a choice of each query beside an attention function that is not known to take a mask of each query.

    Raises:
        HardAttentionError: the implementation cannot serve the site.
    """
    if implementation in ("eager", "sdpa") or not spec.interface:
        return
    known = implementation in ALL_ATTENTION_FUNCTIONS.valid_keys()
    what = f"attn_implementation='{implementation}'" if known else f"the registered attention '{implementation}'"
    raise HardAttentionError(
        f"{what} at '{site}', where each query chooses its own keys; such a choice is made on softmax attention with a mask of each "
        "query. Use attn_implementation='sdpa' or 'eager', or a scorer that makes one choice for all queries."
    )


def install(module: nn.Module, spec: AttentionSpec, layer: int, cross: bool) -> None:
    """Put the forward of this file on an attention module."""
    stock = module.__dict__.get("forward")
    module.__dict__[PLAN] = AttentionPlan(spec, parameter_names(module), layer, cross, stock)
    module.__dict__["forward"] = functools.partial(hard_forward, module)


def uninstall(module: Any) -> None:
    """Take it off again, also where Accelerate has wrapped it since."""
    plan = module.__dict__.pop(PLAN, None)
    if plan is None:
        return
    for name in ("forward", "_old_forward"):
        function = module.__dict__.get(name)
        if isinstance(function, functools.partial) and function.func is hard_forward:
            if plan.stock is not None:
                module.__dict__[name] = plan.stock
            elif name == "forward":
                del module.__dict__[name]
            else:
                module.__dict__[name] = type(module).forward.__get__(module)


def hard_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Attend to what was chosen; the stock forward where nothing was."""
    plan: AttentionPlan = module.__dict__[PLAN]
    given = dict(zip(plan.names, args, strict=False)) | kwargs
    what = given.get(plan.spec.mask)
    if not isinstance(what, AttentionInput):
        stock = plan.stock
        return type(module).forward(module, *args, **kwargs) if stock is None else stock(*args, **kwargs)
    call = AttentionCall(module, plan, given, what)
    if what.pending is not None:
        # imported late: these files build on this one
        from .pending import attend_pending

        return call.finish(*attend_pending(call, what.pending, what.gates))
    if what.packing is not None:
        return call.finish(call.attend_rows(what.packing), None)
    return call.finish(*call.attend_keys(what.keys or KeySubset(), what.gates))


class AttentionCall:
    """One call of an attention module: its arguments, and the steps that the regimes share.

    Attributes:
        view: the module's projections.
        hidden: queries' states ``[B, Q, D]``. source: keys' states ``[B, N, D]``.
        mask: of Transformers, in the form of the attention implementation; the caller's, over all N keys.
        bias: position bias ``[B or 1, H, Q, N]`` or a table of distances; None where the family has none.
        cache: of this layer; None without one.
        wants_weights: the caller asked for attention weights, and the implementation can tell them.
        replaceable: the implementation is softmax attention, so that another way to compute it may take its place.
    """

    def __init__(self, module: Any, plan: AttentionPlan, given: dict[str, Any], what: AttentionInput):
        spec = plan.spec
        self.module, self.plan, self.given = module, plan, given
        self.view = AttentionView(module, spec)
        self.hidden: Tensor = given[plan.names[0]]
        source = None if spec.source is None else given.get(spec.source)
        self.source: Tensor = self.hidden if source is None else source
        self.mask = what.mask
        self.bias: Tensor | None = given.get("position_bias") if not plan.cross else None
        cache = given.get("past_key_values")
        self.cache = None if cache is None else CacheLayer(cache, plan.layer, cross=plan.cross)
        config = module.config
        asked = bool(given.get("output_attentions", getattr(config, "output_attentions", False)))
        self.implementation: str = config._attn_implementation
        self.wants_weights = (asked or what.weights) and (self.implementation == "eager" or not spec.interface)
        # a function of the user's is called, where a known one may be computed in another way
        self.replaceable = not spec.interface or is_softmax(self.implementation)
        self._whole_bias = self._own_bias()
        self._query: Tensor | None = None

    def _own_bias(self) -> Tensor | None:
        """The bias that later layers get from this one: as it came, or the one that this layer makes."""
        if not self.plan.spec.position_bias or self.plan.cross:
            return self.given.get("position_bias")
        if self.bias is None and self.module.has_relative_attention_bias:
            past: Any = 0 if self.cache is None else self.cache.past
            queries = self.hidden.shape[1]
            keys = self.mask.shape[-1] if isinstance(self.mask, Tensor) else queries + past
            self.bias = self.module.compute_bias(queries, keys, device=self.hidden.device, past_seen_tokens=past)
        return self.bias

    def finish(self, attended: Tensor, weights: Tensor | None) -> Any:
        """The module's outputs: attended values ``[B, Q, H * d]`` through the output projection."""
        output = self.view.output(attended)
        return (output, self._whole_bias, weights) if self.plan.spec.position_bias else (output, weights)

    @property
    def query(self) -> Tensor:
        """The projected queries, ``[B, H, Q, d]``."""
        if self._query is None:
            self._query = self.view.query(self.hidden)
        return self._query

    # ---------------------------------------------------------------- one choice for all queries

    def attend_rows(self, packing: Packing) -> Tensor:
        """Attend within each row of packed states ``[1, T, D]``; output ``[1, T, H * d]``."""
        query, key, value = self.view.all(self.hidden)
        options: dict[str, Any] = dict(scale=self.view.scale, bias=self.bias, dropout=self.view.dropout)
        return attend_packed(query, key, value, packing, **options)

    def attend_keys(self, keys: KeySubset, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend to a subset of the keys that serves all queries.

        Args:
            gates: ``[B, N]`` of masked training upstream.

        Returns:
            ``[B, Q, H * d]``, and weights ``[B, H, Q, N]`` when asked for.
        """
        total = multiply_gates(keys.gates, gates)
        if keys.packing is not None and total is None and not self.wants_weights and self.replaceable:
            return self._attend_packed_keys(keys), None
        query, key, value = self._project(keys)
        bias = self._subset_bias(keys)
        if total is not None:
            if keys.indices is not None:
                total = gates_at(total, keys.indices)
            allowed = self._allowed(keys)
            return self._gated(query, key, value, total, allowed, bias, keys)
        if (
            bias is not None
            and keys.indices is not None
            and keys.bias is None
            and not fits(bias, keys.indices)
            and not self.wants_weights
            and self.replaceable
        ):
            return self._attend_by_parts(query, key, value, keys, bias), None
        if bias is not None and keys.indices is not None and keys.bias is None:
            bias = keep_columns(bias, keys.indices)
        output, weights = self._attend(query, key, value, self._subset_mask(keys), bias)
        if weights is not None and keys.indices is not None:
            weights = spread_weights(weights, keys.indices, keys.total)
        return output, weights

    def _project(self, keys: KeySubset) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, and the keys and values of the subset; from the cache once it is filled."""
        if self.cache is not None and self.cache.filled:
            return self.query, *self.cache.read()
        if keys.indices is None:
            together = not self.plan.cross and self._query is None
            query, key, value = self.view.all(self.hidden) if together else self._all_of_source(self.source)
        elif keys.indices.shape[1] == 1:
            query, key, value = self._all_of_source(keep_rows(self.source, keys.indices[:, 0]))
        else:
            query, key, value = self._all_of_source(self.source)
            key, value = keep_heads(key, keys.indices), keep_heads(value, keys.indices)
        if self.cache is not None:
            key, value = self.cache.update(key, value)
        return query, key, value

    def _all_of_source(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.view.key(states), self.view.value(states)

    def _subset_bias(self, keys: KeySubset) -> Tensor | None:
        return self.bias if keys.bias is None else keys.bias

    def _subset_mask(self, keys: KeySubset) -> Any:
        """The mask over the subset, in the form that the implementation reads."""
        mask = self.mask
        if keys.indices is None:
            return mask if keys.valid is None else self._masked(mask, keys.valid)
        if isinstance(mask, Tensor) and _differs_between_queries(mask):
            return combine(gather_keys(mask, keys.indices), keys.valid, self.hidden.dtype)
        if keys.valid is None:
            return None
        return self._form(keys.valid)

    def _masked(self, mask: Any, allowed: Tensor) -> Any:
        """``mask`` and what ``allowed`` hides."""
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return combine(mask, allowed, self.hidden.dtype)
        return self._form(allowed)

    def _form(self, allowed: Tensor) -> Any:
        """A bool mask ``[B, H or 1, Q or 1, K]`` as the implementation reads it."""
        if self.implementation == "sdpa" or not self.plan.spec.interface:
            return allowed
        if self.implementation == "eager":
            return additive(allowed, self.hidden.dtype)
        if allowed.shape[1] > 1 or allowed.shape[2] > 1:
            return allowed
        return padding_mask(allowed[:, 0, 0], self.module.config, self.hidden, allowed[:, 0, 0].unsqueeze(-1))

    def _allowed(self, keys: KeySubset) -> Tensor | None:
        """The keys of the subset that masked training may attend to, bool."""
        allowed = as_allowed(self.mask)
        if keys.indices is not None:
            return keys.valid
        if keys.valid is None or keys.gates is not None and allowed is None:
            return keys.valid if allowed is None else allowed
        return keys.valid if allowed is None else allowed & keys.valid

    def _gated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        allowed: Tensor | None,
        bias: Tensor | None,
        keys: KeySubset,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.replaceable:
            warnings.warn(
                f"the registered attention '{self.implementation}' is not called in masked training, whose gates weigh softmax attention. "
                "Use a score-function estimator, which trains gathered, if it computes anything else.",
                stacklevel=2,
            )
        if bias is not None and keys.indices is not None and keys.bias is None:
            bias = keep_columns(bias, keys.indices)
        options: dict[str, Any] = dict(scale=self.view.scale, bias=bias, dropout=self.view.dropout)
        key, value = self.repeat(key, query), self.repeat(value, query)
        output, weights = gated_attend(query, key, value, gates, allowed=allowed, **options)
        if not self.wants_weights:
            return output.transpose(1, 2).flatten(2), None
        if keys.indices is not None:
            weights = spread_weights(weights, keys.indices, keys.total)
        return output.transpose(1, 2).flatten(2), weights

    def _attend_packed_keys(self, keys: KeySubset) -> Tensor:
        """Attend to kept keys whose numbers differ between rows, without padding them to the longest."""
        packing: Any = keys.packing
        indices: Any = keys.indices
        states = packing.to_packed(keep_rows(self.source, indices[:, 0]))
        query, key, value = self._all_of_source(states)
        if self.cache is not None:
            self.cache.update(packing.heads_to_padded(key), packing.heads_to_padded(value))
        bias = self._subset_bias(keys)
        if bias is not None and keys.bias is None:
            bias = keep_columns(bias, indices)
        options: dict[str, Any] = dict(scale=self.view.scale, bias=bias, dropout=self.view.dropout)
        return attend_packed(query, key, value, packing, **options)

    def _attend_by_parts(self, query: Tensor, key: Tensor, value: Tensor, keys: KeySubset, bias: Tensor) -> Tensor:
        """Attend with a bias whose columns would take more memory than the bias itself: some examples at a time."""
        indices: Any = keys.indices
        options: dict[str, Any] = dict(scale=self.view.scale, dropout=self.view.dropout)
        output = attend_by_parts(query, key, value, indices, bias, allowed=keys.valid, **options)
        return output.transpose(1, 2).flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention by the model's own implementation: ``[B, Q, H * d]``, and weights when asked for."""
        if bias is not None and distances.is_table(bias):
            if mask is None and not self.wants_weights and self.implementation == "sdpa":
                # a view of the table serves as the bias: nothing of size Q x N is made
                output, _ = attend(query, key, value, scale=self.view.scale, bias=bias, dropout=self.view.dropout)
                return output.transpose(1, 2).flatten(2), None
            bias = distances.matrix(bias)
        if not self.plan.spec.interface:
            if bias is None and isinstance(mask, Tensor) and mask.dtype != torch.bool:
                bias, mask = mask, None  # an additive mask, as the kernel takes it
            return self.attend_plainly(query, key, value, mask, bias)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, stock_eager)
        extra: dict[str, Any] = {"position_bias": bias} if self.plan.spec.position_bias else {}
        if self.wants_weights:
            extra["output_attentions"] = True
        output, weights = function(
            self.module, query, key, value, mask, dropout=self.view.dropout, scaling=self.view.scale, **extra
        )
        return output.flatten(2), weights if self.wants_weights else None

    def attend_plainly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None,
        bias: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention by SDPA, for families without an attention function and for choices of each query."""
        output, weights = attend(
            query,
            self.repeat(key, query),
            self.repeat(value, query),
            scale=self.view.scale,
            allowed=allowed,
            bias=bias,
            dropout=self.view.dropout,
            weights=self.wants_weights,
            logits=logits,
        )
        return output.transpose(1, 2).flatten(2), weights if self.wants_weights else None

    @staticmethod
    def repeat(states: Tensor, query: Tensor) -> Tensor:
        """Share ``[B, G, N, d]`` out to the query's H heads, where several heads share a key."""
        groups = query.shape[1] // states.shape[1]
        return states if groups == 1 else states.repeat_interleave(groups, 1)


def stock_eager(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The eager attention function of a module's family; a subclass of the user's lives in another file."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function(module, *args, **kwargs)
    raise NotImplementedError(f"{type(module).__name__} has no eager attention function")


def multiply_gates(chosen: Tensor | None, upstream: Tensor | None) -> Tensor | None:
    """Gates of a choice ``[B, H, Q, N]`` times those from upstream ``[B, N]``; None stands for all ones."""
    if upstream is None:
        return chosen
    upstream = upstream[:, None, None, :]
    return upstream if chosen is None else chosen * upstream


def gates_at(gates: Tensor, indices: Tensor) -> Tensor:
    """Gates ``[B, H or 1, 1, N]`` at the kept positions ``[B, H, K]``, as ``[B, H, 1, K]``."""
    return gates.expand(len(indices), indices.shape[1], 1, -1).gather(-1, indices.unsqueeze(2))


def spread_weights(weights: Tensor, indices: Tensor, n: int) -> Tensor:
    """Attention weights over the kept slots ``[B, H, Q, K]`` to all keys ``[B, H, Q, n]``, zero where nothing was kept."""
    positions = indices.unsqueeze(2).expand(-1, weights.shape[1], weights.shape[2], -1)
    # unused slots repeat a position; their weight is zero, so adding is safe
    return weights.new_zeros(*weights.shape[:3], n).scatter_add(-1, positions, weights)


def _differs_between_queries(mask: Tensor) -> bool:
    return mask.dim() == 4 and mask.shape[2] > 1 and mask.stride(2) != 0
