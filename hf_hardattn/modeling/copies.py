"""Heads that also feed the encoder's input to their decoder: the copy contains only what the encoder's selection kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from .arguments import Arguments
from .context import ForwardContext
from .plan import TowerPlan


def copies_input(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether such a head is called without decoder inputs, so that it feeds the decoder itself. ``names``: its parameters."""
    given = Arguments(names, args, kwargs)
    return given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None


def hide_dropped(plan: TowerPlan, context: ForwardContext, arguments: Arguments) -> None:
    """Remove what the encoder dropped from the decoder's input, which is the encoder's input shifted by one.

    Row p of the decoder's input holds token p - 1. After a selection, it holds the last kept token before p, or the start token, and the
    rows of dropped positions are hidden. Every row stays in its place, where the head expects it.

    Raises:
        HardAttentionError: if the encoder's states were computed in an earlier call, since only that call knows what was kept.
    """
    if context.source_given and plan.source_drops:
        raise HardAttentionError(
            f"encoder_outputs holds only kept states, but this head feeds '{plan.name}' the whole input, which would bring back the dropped "
            "rows. Pass only input_ids, or decoder_input_ids too."
        )
    source = context.towers.get(plan.reads or "")
    ids: Tensor | None = arguments.get("input_ids")
    if source is None or not source.dropped or ids is None:
        return
    kept = source.kept_positions(ids.shape[0], ids.device)
    if kept is None:
        return
    # count from one, so that 0 means "nothing kept so far" and refers to the start token, row 0 of the shifted input
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    last_kept = (kept * place).cummax(1).values
    rows = nn.functional.pad(last_kept[:, :-1], (1, 0))
    arguments.set("input_ids", ids.gather(1, rows))
    # the start token is not an input and appears only once: a choice between copies of one row would depend on rounding
    seen = kept.logical_and(rows) | (place == 1)
    given = arguments.get("attention_mask")
    arguments.set("attention_mask", seen.long() if given is None else given * seen)
