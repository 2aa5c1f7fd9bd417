"""``cross`` sites and the hand-over from encoder to decoder: a decoder layer receives only the rows that it may read."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..errors import HardAttentionError
from .arguments import Arguments
from .cache import CacheLayer, remember, remembered
from .context import ForwardContext
from .keys import is_checkpointed
from .masks import padding_mask, row_of_padding
from .plan import LayerPlan
from .projection import AttentionView
from .rows import choose_among
from .selector import Selector, running
from .state import AttentionInput, KeySubset, PendingChoice, TowerState

SOURCE, SOURCE_MASK = "encoder_hidden_states", "encoder_attention_mask"


@dataclass
class KeptEncoderOutput(BaseModelOutput):
    """An encoder's output together with what its selections kept; ``generate`` expands all of it for beams.

    Attributes:
        kept_indices: int64 ``[B, K]``, position of each row in the encoder's input; None if none was dropped.
        kept_mask: bool ``[B, K]``, rows that may be read; the others hold zeros.
        kept_gates: gates of masked training, fp32 ``[B, K]``; None otherwise.
        input_length: N, number of rows of the encoder's input; None if none was dropped.
    """

    kept_indices: Tensor | None = None
    kept_mask: Tensor | None = None
    kept_gates: Tensor | None = None
    input_length: int | None = None

    def __post_init__(self) -> None:
        """Note which tensors belong together."""
        super().__post_init__()
        self.together = self._rows()

    def _rows(self) -> tuple[Tensor | None, ...]:
        return self.last_hidden_state, self.kept_indices, self.kept_mask, self.kept_gates

    @property
    def belongs_together(self) -> bool:
        """Whether none of the tensors was replaced, or all were, as by ``generate``."""
        now = self._rows()
        replaced = [new is not old for new, old in zip(now, self.together, strict=True) if not (new is old is None)]
        return all(replaced) or not any(replaced)


class Source(NamedTuple):
    """What is known of the rows of a tower that dropped some, for the tower that reads them.

    Attributes:
        valid: bool ``[B, K]``, rows that may be read; None for all.
        gates: fp32 ``[B, K]``, from masked training; None otherwise.
        places: position of each row in the tower's input, int64 ``[B, K]``, and the number of rows there; None if all are there.
    """

    valid: Tensor | None = None
    gates: Tensor | None = None
    places: tuple[Tensor, int] | None = None


def handed_over(output: Any) -> Source | None:
    """Return what an encoder's ``output`` says about its rows, which an earlier call computed; None if it says nothing.

    Raises:
        HardAttentionError: if gates were paired with other rows, which only the gates tell apart.
    """
    if not isinstance(output, KeptEncoderOutput) or output.kept_mask is None:
        return None
    if output.belongs_together:
        indices, rows = output.kept_indices, output.input_length
        return Source(output.kept_mask, output.kept_gates, None if indices is None or rows is None else (indices, rows))
    if output.kept_gates is not None:
        raise HardAttentionError(
            "encoder_outputs holds last_hidden_state of other rows than kept_gates, which weigh the rows of masked training; they belong "
            "together. Select or repeat the rows of every tensor in encoder_outputs, not of last_hidden_state alone."
        )
    return None


def hand_over_source(
    layer: nn.Module, plan: LayerPlan, context: ForwardContext, state: TowerState, arguments: Arguments
) -> None:
    """Pass what a decoder layer's cross-attention reads in its mask argument.

    The key and value projections, the attention and its cache then see only the rows that its site keeps.
    """
    source = None if plan.cross is None else arguments.get(SOURCE)
    if source is None:
        return
    valid = state.source_valid
    if plan.unmasked_source and valid is not None:
        attention: Any = attrgetter(str(plan.cross))(layer)
        rows = arguments.get(plan.names[0])
        mask = state.shared(valid, lambda: padding_mask(valid, attention.config, rows, source))
        arguments.set(SOURCE_MASK, mask)
    what = None
    if plan.crosses or plan.cross_follows is not None:
        what = _chosen(layer, plan, context, state, arguments, source)
    if what is None:
        what = _unchosen(plan, state, arguments)
    if what is None and state.source_places is None:
        return
    if state.wants_weights(attrgetter(str(plan.cross))(layer), arguments):
        what = (what or AttentionInput(arguments.get(SOURCE_MASK)))._replace(weights=True, places=state.source_places)
    else:
        state.source_places = None  # later layers need not look
    if what is not None:
        arguments.set(SOURCE_MASK, what)


def _unchosen(plan: LayerPlan, state: TowerState, arguments: Arguments) -> AttentionInput | None:
    """Return the input of a layer without a choice, which still applies the source's gates and hides its unused slots."""
    mask = arguments.get(SOURCE_MASK)
    if state.source_gates is not None:
        return AttentionInput(mask, gates=state.source_gates)
    if not plan.eager_only:
        return None
    # stock attention of this kind loses the mask and reads padding too, but slots that a selection left unused must be hidden
    hides = state.source_dropped and state.source_valid is not None
    return AttentionInput(mask if hides else None)


def _chosen(
    layer: nn.Module,
    plan: LayerPlan,
    context: ForwardContext,
    state: TowerState,
    arguments: Arguments,
    source: Tensor,
) -> AttentionInput | None:
    attention: Any = attrgetter(str(plan.cross))(layer)
    mask, cache = arguments.get(SOURCE_MASK), None if is_checkpointed(layer) else arguments.get("past_key_values")
    if state.source_valid is not None:
        mask = row_of_padding(mask)
    selector = None if plan.cross_follows is not None else running(attention.selector)
    if selector is not None and context.is_soft(selector):
        return None
    once = selector is None or selector.once
    if once and cache is not None and CacheLayer(cache, plan.index, cross=True).filled:
        # the first step has chosen, and its keys are cached
        site = plan.cross_follows if selector is None else selector.site
        keys = remembered(cache, str(site))
        return None if keys is None else AttentionInput(mask, keys, state.source_gates)
    if selector is None:
        keys = state.leaders.get(str(plan.cross_follows))
        return None if keys is None else AttentionInput(mask, keys, state.source_gates)
    if not (once and is_checkpointed(layer)):
        return AttentionInput(mask, gates=state.source_gates, pending=PendingChoice(plan, context, state))
    view = AttentionView(attention, plan.spec_of_cross)
    keys = choose_source_keys(selector, plan, context, state, view, source, mask, None)
    return None if keys is None else AttentionInput(mask, keys, state.source_gates)


def choose_source_keys(
    selector: Selector,
    plan: LayerPlan,
    context: ForwardContext,
    state: TowerState,
    view: AttentionView,
    source: Tensor,
    mask: Any,
    cache: Any,
) -> KeySubset | None:
    """Choose among the rows of the source ``[B, N, D]``, once for all queries; return None to read all of them.

    Args:
        mask: mask of the source, as passed to the layer. cache: cache of the model, which later steps read, or None.
    """
    valid = source_candidates(state, mask)
    selection = choose_among(
        context,
        selector,
        source,
        valid,
        plan.source_protected,
        projections=view.projections,
        notes=state.notes_of(valid),
    )
    if selection is None:
        return None
    keys = KeySubset.of(selection)
    if selector.site in plan.leads:
        state.leaders[selector.site] = keys
    if cache is not None:
        gates = None if keys.gates is None else keys.gates.detach()
        remember(cache, selector.site, keys._replace(packing=None, gates=gates))
    return keys


def source_candidates(state: TowerState, mask: Any) -> Tensor | None:
    """Return which rows of the source a choice may keep, bool ``[B, N]``; None if it may keep all.

    Args:
        mask: mask of the source, as passed to the layer; None if Transformers found that it hides nothing.
    """
    valid = None if mask is None else state.source_valid
    if state.source_gates is None:
        return valid
    present = state.source_gates.detach() > 0
    return present if valid is None else valid & present
