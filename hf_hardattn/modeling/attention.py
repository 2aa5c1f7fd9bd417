"""One attention call of a hard model, in every execution regime, using the names in its ``AttentionSpec``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..functional import position_bias as distances
from ..functional.attention import (
    attend,
    attend_by_parts,
    attend_packed,
    fits,
    gated_attend,
    gates_at,
    keep_columns,
    keep_heads,
    keep_rows,
    multiply_gates,
    spread_weights,
)
from ..functional.varlen import Packing
from .cache import CacheLayer
from .implementations import is_softmax, stock_eager
from .masks import additive, as_allowed, causal_mask, combine, differs_between_queries, opened, padding_mask, silence
from .plan import AttentionPlan
from .projection import AttentionView
from .rotary import Tables, packed_tables, tables_at
from .state import AttentionInput, KeySubset


class AttentionCall:
    """One call of an attention module: its arguments, and the steps that the regimes share.

    Attributes:
        view: the module's projections.
        hidden: queries' states ``[B, Q, D]``. source: keys' states ``[B, N, D]``.
        mask: the caller's mask over all N keys, in the form of the attention implementation.
        tables: tables of the rotary embedding for all N keys; None if the family has none.
        causal: without a mask, a row attends only to its past.
        bias: position bias ``[B or 1, H, Q, N]`` or a table of distances; None if the family has none.
        cache: cache of this layer, or None.
        wants_weights: the caller requested attention weights, and the implementation can return them.
        replaceable: the implementation is softmax attention, so that it may be computed in another way.
    """

    def __init__(self, module: Any, plan: AttentionPlan, given: dict[str, Any], what: AttentionInput):
        spec = plan.spec
        self.module, self.plan, self.given = module, plan, given
        tables: Tables | None = None if spec.rotary is None or plan.cross else given.get(spec.rotary)
        self.view = AttentionView(module, spec, tables)
        self.hidden: Tensor = given[plan.names[0]]
        source = None if spec.source is None else given.get(spec.source)
        self.source: Tensor = self.hidden if source is None else source
        self.mask = what.mask
        self.tables = tables
        self.causal = bool(given.get("is_causal")) and self.hidden.shape[1] > 1
        self.bias: Tensor | None = what.bias
        if self.bias is None and not plan.cross:
            self.bias = given.get("position_bias")
        cache = given.get("past_key_values")
        self.cache = None if cache is None else CacheLayer(cache, plan.layer, cross=plan.cross)
        self.implementation: str = module.config._attn_implementation
        asked = what.weights or bool(given.get("output_attentions"))
        self.wants_weights = asked and (self.implementation == "eager" or not spec.interface)
        # a user's function must be called, while a known one may be computed in another way
        self.replaceable = not spec.interface or is_softmax(self.implementation)
        self._places = what.places
        self._whole_bias = self._own_bias()
        self._query: Tensor | None = None

    def _own_bias(self) -> Tensor | None:
        """Return the bias that this T5 layer passes to later ones: the bias that it received, or the one that it computes."""
        if not self.biased or self.plan.cross:
            return self.given.get("position_bias")
        if self.bias is None and self.module.has_relative_attention_bias:
            past: Any = 0 if self.cache is None else self.cache.past
            queries = self.hidden.shape[1]
            keys = self.mask.shape[-1] if isinstance(self.mask, Tensor) else queries + past
            self.bias = self.module.compute_bias(queries, keys, device=self.hidden.device, past_seen_tokens=past)
        return self.bias

    def finish(self, attended: Tensor, weights: Tensor | None) -> Any:
        """Return the module's outputs from the attended values ``[B, Q, H * d]``, after the output projection."""
        output = self.view.output(attended)
        if weights is not None and self._places is not None:
            indices, rows = self._places
            weights = spread_weights(weights, indices[:, None], rows)
        return (output, self._whole_bias, weights) if self.plan.spec.position_bias else (output, weights)

    @property
    def biased(self) -> bool:
        """Whether the module adds a relative position bias."""
        return self.plan.spec.position_bias or self.plan.spec.own_bias

    @property
    def query(self) -> Tensor:
        """The projected queries, ``[B, H, Q, d]``, rotated by their positions."""
        if self._query is None:
            self._query = self.view.rotated(self.view.query(self.hidden), self.tables)
        return self._query

    def key(self, states: Tensor, tables: Tables | None) -> Tensor:
        """Return the projected keys of ``states``, ``[B, H, N, d]``, rotated by the positions in ``tables``."""
        return self.view.rotated(self.view.key(states), tables)

    def _tables_at(self, indices: Tensor) -> Tables | None:
        """Return the rotary tables of the keys at int64 ``[B, K]``."""
        return None if self.tables is None else tables_at(self.tables, indices, self.source.shape[1])

    # ---------------------------------------------------------------- one choice for all queries

    def attend_rows(self, packing: Packing) -> Tensor:
        """Attend within each row of packed states ``[1, T, D]``; output ``[1, T, H * d]``."""
        query, key, value = self.view.all(self.hidden)
        if self.tables is not None:
            tables = packed_tables(self.tables, packing)
            query, key = self.view.rotated(query, tables), self.view.rotated(key, tables)
        options: dict[str, Any] = dict(scale=self.view.scale, bias=self.bias, dropout=self.view.dropout)
        return attend_packed(query, key, value, packing, **options)

    def attend_keys(self, keys: KeySubset, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend to a subset of the keys, the same for all queries.

        Args:
            gates: ``[B, N]``, from masked training at earlier sites.

        Returns:
            ``[B, Q, H * d]``, and weights ``[B, H, Q, N]`` if requested.
        """
        total = multiply_gates(keys.gates, gates)
        if total is not None and keys.indices is not None:
            total = gates_at(total, keys.indices)
        restricts = total is not None or keys.indices is not None or keys.valid is not None
        window, allowed, blind = self._window() if restricts else None, None, None
        if window is not None:
            allowed, blind = opened(window, keys.indices, keys.valid if total is None else total.detach() > 0)
        plainly = total is None and not self.wants_weights and self.replaceable
        if keys.packing is not None and window is None and plainly:
            return self._attend_packed_keys(keys), None
        query, key, value = self._project(keys)
        bias = self.bias if keys.bias is None else keys.bias
        in_parts = False
        if bias is not None and keys.indices is not None and keys.bias is None:
            in_parts = plainly and not fits(bias, keys.indices)
            bias = bias if in_parts else keep_columns(bias, keys.indices)
        if total is not None:
            output, weights = self._gated(query, key, value, total, self._allowed(keys, allowed), bias)
        elif in_parts:
            output, weights = self._attend_by_parts(query, key, value, keys, bias, allowed), None
        else:
            output, weights = self._attend(query, key, value, self._subset_mask(keys, allowed), bias)
        if blind is not None:
            # a query that may read none of the kept keys reads nothing, rather than another text or what follows it
            output = silence(output, blind)
            weights = None if weights is None else weights.masked_fill(blind, 0.0)
        if weights is not None and keys.indices is not None:
            weights = spread_weights(weights, keys.indices, keys.total)
        return output, weights

    def _project(self, keys: KeySubset) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, and the keys and values of the subset, which come from the cache once it is filled."""
        if self.cache is not None and self.cache.filled:
            return self.query, *self.cache.read()
        if keys.indices is None:
            query, key, value = self._all_rows()
        elif keys.indices.shape[1] == 1:
            indices = keys.indices[:, 0]
            query, key, value = self._all_of_source(keep_rows(self.source, indices), self._tables_at(indices))
        else:
            query, key, value = self._all_of_source(self.source, self.tables)
            key, value = keep_heads(key, keys.indices), keep_heads(value, keys.indices)
        if self.cache is not None:
            key, value = self.cache.update(key, value)
        return query, key, value

    def _all_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.plan.cross or self._query is not None:
            return self._all_of_source(self.source, self.tables)
        query, key, value = self.view.all(self.hidden)
        return self.view.rotated(query, self.tables), self.view.rotated(key, self.tables), value

    def _all_of_source(self, states: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key(states, tables), self.view.value(states)

    def _subset_mask(self, keys: KeySubset, allowed: Tensor | None) -> Any:
        """Return the mask over the subset, in the form that the implementation reads; ``allowed`` differs between queries."""
        if keys.indices is None and keys.valid is None:
            return self.mask
        if allowed is not None:
            return self._form(allowed if keys.valid is None else allowed & keys.valid)
        if keys.indices is None and isinstance(self.mask, Tensor) and self.mask.dim() == 4:
            return combine(self.mask, keys.valid, self.hidden.dtype)
        return None if keys.valid is None else self._form(keys.valid)

    def _window(self) -> Tensor | None:
        """Return the bool mask over all keys if it differs between queries; None if it does not."""
        if self.mask is None and self.causal:
            return causal_mask(self.hidden.shape[1], self.hidden.device)
        if isinstance(self.mask, Tensor) and not differs_between_queries(self.mask):
            return None
        if isinstance(self.mask, BlockMask) and not self.plan.windows:
            return None  # it hides padding, which no choice keeps
        return as_allowed(self.mask) if isinstance(self.mask, Tensor | BlockMask) else None

    def _form(self, allowed: Tensor) -> Any:
        """Convert a bool mask ``[B, H or 1, Q or 1, K]`` to the form that the implementation reads."""
        if self.implementation == "sdpa" or not self.plan.spec.interface:
            return allowed
        if self.implementation == "eager":
            return additive(allowed, self.hidden.dtype)
        if allowed.shape[1] > 1 or allowed.shape[2] > 1:
            return allowed
        return padding_mask(allowed[:, 0, 0], self.module.config, self.hidden, allowed[:, 0, 0].unsqueeze(-1))

    def _allowed(self, keys: KeySubset, allowed: Tensor | None) -> Tensor | None:
        """Return a bool mask of the subset's keys that masked training may attend to; ``allowed`` differs between queries."""
        if allowed is None and keys.indices is None and not isinstance(self.mask, BlockMask):
            allowed = as_allowed(self.mask)
        return _both(allowed, keys.valid)

    def _gated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        allowed: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.replaceable:
            warnings.warn(
                f"the registered attention '{self.implementation}' is not called in masked training, where gates weight softmax attention. "
                "If it computes anything else, use a score-function estimator, which trains gathered.",
                stacklevel=2,
            )
        options: dict[str, Any] = dict(scale=self.view.scale, bias=bias, dropout=self.view.dropout)
        key, value = self.repeat(key, query), self.repeat(value, query)
        output, weights = gated_attend(query, key, value, gates, allowed=allowed, **options)
        return output.transpose(1, 2).flatten(2), weights if self.wants_weights else None

    def _attend_packed_keys(self, keys: KeySubset) -> Tensor:
        """Attend to kept keys whose number differs between rows, without padding them to the longest row."""
        packing: Any = keys.packing
        indices: Any = keys.indices
        states = packing.to_packed(keep_rows(self.source, indices[:, 0]))
        tables = self._tables_at(indices[:, 0])
        tables = None if tables is None else packed_tables(tables, packing)
        query, key, value = self._all_of_source(states, tables)
        if self.cache is not None:
            self.cache.update(packing.heads_to_padded(key), packing.heads_to_padded(value))
        bias = keys.bias
        if bias is None and self.bias is not None:
            bias = keep_columns(self.bias, indices)
        options: dict[str, Any] = dict(scale=self.view.scale, bias=bias, dropout=self.view.dropout)
        return attend_packed(query, key, value, packing, **options)

    def _attend_by_parts(
        self, query: Tensor, key: Tensor, value: Tensor, keys: KeySubset, bias: Any, allowed: Tensor | None
    ) -> Tensor:
        """Attend for a few examples at a time, if the columns of the bias would take more memory than the bias itself."""
        indices: Any = keys.indices
        options: dict[str, Any] = dict(scale=self.view.scale, dropout=self.view.dropout)
        output = attend_by_parts(query, key, value, indices, bias, allowed=_both(allowed, keys.valid), **options)
        return output.transpose(1, 2).flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the model's own implementation: ``[B, Q, H * d]``, and weights if requested."""
        if bias is not None and distances.is_table(bias):
            if mask is None and not self.wants_weights and self.implementation == "sdpa":
                # a view of the table serves as the bias, so nothing of size Q x N is allocated
                output, _ = attend(query, key, value, scale=self.view.scale, bias=bias, dropout=self.view.dropout)
                return output.transpose(1, 2).flatten(2), None
            bias = distances.matrix(bias)
        differs = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape[1:3] != (1, 1)
        if not self.plan.spec.interface or differs and self.implementation != "sdpa" and self.replaceable:
            if bias is None and isinstance(mask, Tensor) and mask.dtype != torch.bool:
                bias, mask = mask, None  # the kernel takes an additive mask as its bias
            return self.attend_plainly(query, key, value, mask, bias)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, stock_eager)
        extra: dict[str, Any] = {"position_bias": bias} if self.biased else {}
        if self.causal:
            extra["is_causal"] = True
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
        """Compute softmax attention by SDPA, for families without an attention function and for per-query choices."""
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
        """Repeat ``[B, G, N, d]`` for the query's H heads, where several heads share a key."""
        groups = query.shape[1] // states.shape[1]
        return states if groups == 1 else states.repeat_interleave(groups, 1)


def _both(allowed: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Return what two bool masks both allow; None allows everything."""
    if allowed is None or valid is None:
        return valid if allowed is None else allowed
    return allowed & valid
