"""``self`` sites: which keys a layer's self-attention reads.

The choice is made inside the attention, where the normalised states are available. Under gradient checkpointing, it is made before the
layer, so that the recomputation in the backward pass does not repeat it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..functional import position_bias as distances
from ..functional.attention import fits, keep_columns
from .context import ForwardContext
from .plan import LayerPlan
from .projection import AttentionView
from .queries import allowed_keys
from .rotary import Tables
from .rows import choose_among
from .selector import Candidates, Selector, running
from .state import AttentionInput, KeySubset, PendingChoice, TowerState


def attention_input(
    layer: nn.Module,
    attention: Any,
    plan: LayerPlan,
    context: ForwardContext,
    state: TowerState,
    hidden: Tensor,
    mask: Any,
    bias: Tensor | None,
    tables: Tables | None,
) -> AttentionInput | None:
    """Return the input that the self-attention at a ``self`` site gets in place of the mask; None if the stock attention suffices.

    Args:
        attention: self-attention of the layer.
        hidden: the layer's rows ``[B, N, D]``. mask: mask over them, in the form of the attention implementation.
        bias: position bias as passed to the layer. tables: tables of the rotary embedding for the rows.
    """
    if plan.follows is not None:
        keys = state.leaders.get(plan.follows)
        return None if keys is None else AttentionInput(mask, keys, state.gates)
    selector = running(attention.selector)
    if context.is_soft(selector):
        return None
    if not is_checkpointed(layer):
        return AttentionInput(mask, gates=state.gates, pending=PendingChoice(plan, context, state))
    norm = None if plan.norm is None else attrgetter(plan.norm)(layer)
    states = hidden if norm is None else norm(hidden)
    view = AttentionView(attention, plan.attention_spec, tables)
    keys = choose_keys(selector, plan, context, state, view, states, mask, bias)
    return None if keys is None else AttentionInput(mask, keys, state.gates)


def is_checkpointed(layer: Any) -> bool:
    """Return whether the layer's forward will be recomputed in the backward pass; Transformers then takes its cache away."""
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


def choose_keys(
    selector: Selector,
    plan: LayerPlan,
    context: ForwardContext,
    state: TowerState,
    view: AttentionView,
    states: Tensor,
    mask: Any,
    bias: Tensor | None,
) -> KeySubset | None:
    """Choose among the keys of ``states`` ``[B, N, D]``, normalised as the attention reads them; return None to read all of them."""
    if not selector.once:
        return _choose_per_query(selector, context, state, view, states, mask)
    valid = state.candidates
    notes = state.notes_of(valid)
    selection = choose_among(
        context, selector, states, valid, plan.protected, projections=view.projections, notes=notes
    )
    if selection is None:
        return None
    selection.positions = state.positions
    keys = KeySubset.of(selection)
    if selector.site in plan.leads:
        if bias is not None and keys.indices is not None and fits(bias, keys.indices):
            keys = keys._replace(bias=keep_columns(bias, keys.indices))
        state.leaders[selector.site] = keys
    return keys


def _choose_per_query(
    selector: Selector, context: ForwardContext, state: TowerState, view: AttentionView, states: Tensor, mask: Any
) -> KeySubset:
    settings = context.settings(selector)
    if selector.scorer.reads_logits:
        features = view.logits(states)
        features = features.detach() if selector.estimator.detaches else features
    else:
        features = selector.keys(states, settings, None, 0, view.projections())
    n = states.shape[1]
    allowed = allowed_keys(mask, n, n, selector.causal, states.device)
    valid, chosen = allowed, state.chosen
    if chosen is not None:
        valid = chosen[:, None, None] if valid is None else valid & chosen[:, None, None]
    inputs = selector.training_inputs(states, None, context, settings)
    selection = selector(features, Candidates(valid), settings, queries=states, inputs=inputs)
    selection.positions = state.positions
    context.add(selection, settings)
    used = allowed if selection.gates is not None else selection.mask
    return KeySubset(valid=used, gates=selection.gates, total=n)


def serves_table(what: AttentionInput | None, mask: Any, implementation: str, weights: bool, masked: bool) -> bool:
    """Return whether a layer can read T5's bias as a table of distances instead of a matrix.

    Args:
        masked: the choice that the attention will make weighs all keys, or differs between queries.
    """
    if weights or (what is not None and (what.gates is not None or what.packing is not None)):
        return False
    if what is not None and what.pending is not None:
        return not masked
    keys = None if what is None else what.keys
    if keys is not None and keys.indices is not None:
        return keys.gates is None
    plain = keys is None or (keys.valid is None and keys.gates is None)
    return plain and mask is None and implementation == "sdpa"


def as_matrix(bias: Tensor) -> Tensor:
    """Return a position bias as a matrix."""
    return distances.matrix(bias) if distances.is_table(bias) else bias
