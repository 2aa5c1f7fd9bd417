"""The hooks of a layer: before it, they choose the rows and keys that it computes with; after it, the rows for later layers."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..functional import position_bias as distances
from ..functional.attention import keep_rows
from .arguments import Arguments, given
from .checkpointing import checkpoint_without_reentry
from .context import CONTEXT, ForwardContext
from .cross import hand_over_source
from .implementations import is_softmax
from .keys import as_matrix, attention_input, serves_table
from .masks import differs_between_queries, row_mask, row_of_padding
from .plan import LAYER, LayerPlan
from .position_bias import bias_of_rows, bias_table, own_bias_of_rows
from .projection import projections_of
from .rotary import tables_at
from .rows import select_rows
from .selector import running
from .state import AttentionInput, TowerState


def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a layer: choose at its ``inputs``, ``self`` and ``cross`` sites, and reduce its other inputs to the kept rows.

    Returns:
        The arguments to run with; None if nothing changes.
    """
    context: ForwardContext | None = kwargs.get(CONTEXT)
    plan: LayerPlan = layer.__dict__[LAYER]
    state = None if context is None else context.towers.get(plan.tower)
    if context is None or state is None:
        return None  # a layer called on its own computes as the original one
    if state.begun and plan.only_narrows and not _reads_specially(plan, state):
        if not state.dropped:
            return None
        mask = given(plan.names, args, kwargs, "attention_mask")
        if plan.reads_rows_alone and state.is_dense and mask is None:
            return None
    arguments = Arguments(plan.names, args, kwargs)
    rows = _Rows(layer, plan, context, state, arguments)
    rows.begin()
    rows.select_inputs()
    rows.hand_over_mask()
    hand_over_source(layer, plan, context, state, arguments)
    chooses = plan.own or plan.crosses or plan.follows or plan.cross_follows
    if chooses or state.gates is not None or state.source_gates is not None:
        checkpoint_without_reentry(layer, plan.chooses_inside)
    return arguments.result()


def _reads_specially(plan: LayerPlan, state: TowerState) -> bool:
    """Return whether a cross-attention without its own site applies gates, hides slots that its tower's mask shows, or spreads its weights."""
    hides = plan.unmasked_source and state.source_dropped and state.source_valid is not None
    return plan.cross is not None and (hides or state.source_gates is not None or state.source_places is not None)


class _Rows:
    """The self-attention side of one layer's call: rows, mask, position bias."""

    def __init__(
        self, layer: nn.Module, plan: LayerPlan, context: ForwardContext, state: TowerState, arguments: Arguments
    ):
        self.layer, self.plan, self.context, self.state, self.arguments = layer, plan, context, state, arguments
        self.hidden: Tensor = arguments.get(plan.names[0])

    @property
    def attention(self) -> Any:
        return attrgetter(self.plan.attention)(self.layer)

    def begin(self) -> None:
        """Read which rows are valid and build T5's bias as a table of distances, at the first hooked layer."""
        if self.state.begun:
            return
        self.state.begin(self.hidden.shape[1], self.arguments.get("attention_mask"))
        if self.plan.uses_table and self.arguments.get("position_bias") is None:
            table = bias_table(self.attention, self.hidden.shape[1], self.hidden.device)
            self.arguments.set("position_bias", table)

    def select_inputs(self) -> None:
        """Choose among the rows before the first layer."""
        plan, hidden = self.plan, self.hidden
        if not plan.inputs:
            return
        projections = projections_of(self.layer, plan)
        indices = select_rows(
            self.context, self.state, self.layer, "input_selector", plan.protected, hidden, hidden, projections
        )
        if indices is None:
            return
        self.hidden = keep_rows(hidden, indices)
        self.arguments.set(plan.names[0], self.hidden)
        if plan.has_bias:
            self.arguments.set("position_bias", bias_of_rows(self.arguments.get("position_bias"), indices))

    def hand_over_mask(self) -> None:
        """Pass what the self-attention reads in the mask argument."""
        plan, state, arguments = self.plan, self.state, self.arguments
        if not plan.attention:
            return
        self._narrow_tables()
        given = arguments.get("attention_mask")
        mask = given
        if state.dropped or plan.windows:
            mask = row_mask(state, plan, self.attention.config, self.hidden, given)
        what = self._attention_input(mask)
        if plan.has_bias:
            what = self._settle_bias(what, mask)
        if plan.attention_spec.own_bias and state.positions is not None:
            bias = own_bias_of_rows(self.attention, state.positions, state.length)
            what = (what or AttentionInput(mask))._replace(bias=bias)
        if what is not None:
            arguments.set("attention_mask", what._replace(weights=True) if self._wants_weights else what)
        elif mask is not given:
            arguments.set("attention_mask", mask)

    def _narrow_tables(self) -> None:
        """Give the layer the rotary tables of the remaining rows."""
        name, positions = self.plan.attention_spec.rotary, self.state.positions
        tables = None if name is None or positions is None else self.arguments.get(name)
        if name is not None and positions is not None and tables is not None:
            found = self.state.shared(tables[0], lambda: tables_at(tables, positions, self.state.length))
            self.arguments.set(name, found)

    def _attention_input(self, mask: Any) -> AttentionInput | None:
        plan, state, arguments = self.plan, self.state, self.arguments
        if plan.own or plan.follows is not None:
            if state.mask is not None and not (plan.windows or plan.causal or state.per_query):
                mask = row_of_padding(mask)
            bias = arguments.get("position_bias") if plan.has_bias else None
            tables = None if plan.attention_spec.rotary is None else arguments.get(plan.attention_spec.rotary)
            what = attention_input(
                self.layer, self.attention, plan, self.context, state, self.hidden, mask, bias, tables
            )
            if what is not None:
                return what
        if state.gates is not None:
            return AttentionInput(mask, gates=state.gates)
        if state.packing is not None and not self._wants_weights and self._may_pack(mask):
            arguments.set(plan.names[0], state.packing.to_packed(self.hidden))
            return AttentionInput(packing=state.packing)
        return AttentionInput(mask) if plan.eager_only and plan.attention and self._serves_sdpa(mask) else None

    def _may_pack(self, mask: Any) -> bool:
        """Return whether each row of a packed batch may attend to all of itself without the implementation's own function."""
        differs = isinstance(mask, Tensor) and differs_between_queries(mask)
        if differs or self.plan.causal or (self.plan.windows and isinstance(mask, BlockMask)):
            return False
        return not self.plan.attention_spec.interface or is_softmax(self.attention.config._attn_implementation)

    def _serves_sdpa(self, mask: Any) -> bool:
        """Return whether the attention of a family without an attention function is computed here; only the stock one returns weights."""
        return not self._wants_weights or mask is not None

    def _settle_bias(self, what: AttentionInput | None, mask: Any) -> AttentionInput | None:
        """Keep T5's bias as a table of distances if this layer can read one; otherwise build the matrix for all later layers."""
        bias = self.arguments.get("position_bias")
        if bias is None or not distances.is_table(bias):
            return what
        implementation = self.attention.config._attn_implementation
        if serves_table(what, mask, implementation, self._wants_weights, self._is_masked(what)):
            return AttentionInput(mask) if what is None else what
        self.arguments.set("position_bias", as_matrix(bias))
        return what

    def _is_masked(self, what: AttentionInput | None) -> bool:
        if what is None or what.pending is None:
            return False
        selector = running(self.attention.selector)
        return not selector.once or self.context.runs_masked(selector)

    @property
    def _wants_weights(self) -> bool:
        return self.state.wants_weights(self.attention, self.arguments)


def after_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a layer: restore the padding of packed rows, and choose at its ``tokens`` site.

    Returns:
        The output with the remaining rows; None if nothing changes.
    """
    context: ForwardContext | None = kwargs.get(CONTEXT)
    plan: LayerPlan = layer.__dict__[LAYER]
    state = None if context is None else context.towers.get(plan.tower)
    if context is None or state is None:
        return None
    arguments = Arguments(plan.names, args, kwargs)
    whole = isinstance(output, tuple)
    hidden: Tensor = output[0] if whole else output
    changed = False
    if _is_packed(arguments) and state.packing is not None:
        hidden, changed = state.packing.to_padded(hidden), True
    bias = output[1] if whole and plan.has_bias else None
    if plan.tokens:
        if not state.begun:
            state.begin(hidden.shape[1], arguments.get("attention_mask"))
        indices = _select_tokens(layer, plan, context, state, arguments, hidden)
        if indices is not None:
            hidden, changed = keep_rows(hidden, indices), True
            bias = bias_of_rows(bias, indices)
    if plan.pools and state.chosen is not None:
        hidden, changed = state.gather_chosen(hidden), True
    if plan.restores and state.positions is not None:
        hidden, changed = state.restore(hidden), True
    if plan.tokens and not changed and hidden.requires_grad and hasattr(layer, "set_reshard_after_backward"):
        # FSDP2 fetches a layer's weights when the gradient reaches the layer's output. The output must therefore be created after the
        # choice; otherwise the gradient reaches the selector first, whose weights are not there yet
        hidden, changed = hidden.clone(), True
    if not changed:
        return None
    if not whole:
        return hidden
    return (hidden, bias, *output[2:]) if plan.has_bias else (hidden, *output[1:])


def _select_tokens(
    layer: nn.Module, plan: LayerPlan, context: ForwardContext, state: TowerState, arguments: Arguments, hidden: Tensor
) -> Any:
    states = arguments.get(plan.names[0])
    if _is_packed(arguments) and state.packing is not None:
        states = state.packing.to_padded(states)
    return select_rows(context, state, layer, "selector", plan.protected, hidden, states, projections_of(layer, plan))


def _is_packed(arguments: Arguments) -> bool:
    what = arguments.get("attention_mask")
    return isinstance(what, AttentionInput) and what.packing is not None
