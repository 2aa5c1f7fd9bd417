"""Heads that show their decoder the encoder's input once more: the copy holds what the encoder's selection kept, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from .arguments import Arguments
from .context import ForwardContext
from .plan import TowerPlan


def copies_input(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of such a head leaves it to the head to feed the decoder. ``names`` are its parameters."""
    given = Arguments(names, args, kwargs)
    return given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None


def hide_dropped(plan: TowerPlan, context: ForwardContext, arguments: Arguments) -> None:
    """Take what the encoder dropped out of the decoder's input, the encoder's shifted by one.

    Row p of it holds token p - 1. Behind a selection it holds the last kept token before p, or the start token; the rows of dropped
    positions are hidden. Every row stays at its place, where the head looks for it.

    Raises:
        HardAttentionError: the encoder's states were computed in an earlier call, which alone knows what it kept.
    """
    if context.source_given and context.kept_source is not None:
        raise HardAttentionError(
            f"encoder_outputs holds states that a selection left, and this head feeds '{plan.name}' the whole input; what was dropped would "
            "come back through it. Give input_ids alone, or decoder_input_ids too."
        )
    source = context.towers.get(plan.reads or "")
    ids: Tensor | None = arguments.get("input_ids")
    if source is None or not source.dropped or ids is None:
        return
    kept = source.kept_positions(ids.shape[0], ids.device)
    if kept is None:
        return
    # counted from one, so that row 0 of the encoder's input shifted by one, the start token, is "nothing kept so far"
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    last_kept = (kept * place).cummax(1).values
    rows = nn.functional.pad(last_kept[:, :-1], (1, 0))
    arguments.set("input_ids", ids.gather(1, rows))
    # the start token is no input, and is there once: a choice between copies of one row would hang on rounding
    seen = kept.logical_and(rows) | (place == 1)
    given = arguments.get("attention_mask")
    arguments.set("attention_mask", seen.long() if given is None else given * seen)
