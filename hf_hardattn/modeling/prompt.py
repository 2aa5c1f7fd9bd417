"""What a decoder's call knows about its prompt."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from .arguments import Arguments
from .context import ForwardContext
from .plan import TowerPlan
from .prompt_memory import MEMORY, PromptMemory

CANDIDATES = "hard_attention_candidates"  # ids of a model's tokens that represent an image's rows


class PromptCall:
    """One call of a decoder.

    Attributes:
        memory: memory of the cache that earlier calls filled; None while the prompt is read.
        candidates: bool ``[B, N]``, rows of an image; None if the choice is among all rows of the prompt.
        answer: bool ``[B or 1, N]``, rows that are not part of the prompt: from the first label on, or drafted by assisted decoding; None
            if all are the prompt.
        problem: why nothing can be selected in this call, with a placeholder for the site; None if selection is possible.
        later: mask of the rows generated after the prompt, bool ``[B, M]``; None if every row is valid.
        valid: bool ``[B or 1, N]``, rows that are not padding, before any selection; None if there is no padding.
    """

    def __init__(self) -> None:
        self.memory: PromptMemory | None = None
        self.candidates: Tensor | None = None
        self.answer: Tensor | None = None
        self.problem: str | None = None
        self.later: Tensor | None = None
        self.valid: Tensor | None = None


def open_prompt(tower: Any, plan: TowerPlan, context: ForwardContext, arguments: Arguments) -> PromptCall:
    """Determine whether a call reads a prompt or continues one, and which of its rows are the prompt."""
    call = PromptCall()
    rows = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else arguments.get("inputs_embeds")
    cache, count = arguments.get("past_key_values"), rows.shape[1]
    memory: PromptMemory | None = getattr(cache, MEMORY, None)
    if _is_filled(cache, memory, count):
        _go_on(call, memory, cache, count, rows.device, arguments)
    else:
        if memory is not None:
            delattr(cache, MEMORY)  # of an earlier prompt, in a static cache that is reused
        _read_labels(call, context, count)
        if call.answer is None and 1 < context.predictions <= count and any(mode.assisted for mode in context.modes):
            # assisted decoding reads its first draft together with the prompt, and requests logits from the prompt's last row on
            place = torch.arange(count, device=rows.device)
            call.answer = (place > count - context.predictions).unsqueeze(0)
        if context.ids is not None:
            owner: Any = context.owner
            call.candidates = torch.stack([context.ids == token for token in owner.__dict__[CANDIDATES]]).any(0)
        call.problem = call.problem or _unknown_prompt(tower, context, arguments)
    return call


def _is_filled(cache: Any, memory: PromptMemory | None, count: int) -> bool:
    if cache is None:
        return False
    if memory is not None and count == 1 and torch.compiler.is_compiling():
        return True  # compiled decoding steps must not wait for the device
    return int(cache.get_seq_length()) > 0


def _go_on(
    call: PromptCall, memory: PromptMemory | None, cache: Any, count: int, device: torch.device, arguments: Arguments
) -> None:
    """Set up a call after the prompt, which selects nothing."""
    if memory is None:
        # This model leaves a record with every cache that it fills. Without one, the layers may hold any rows.
        memory = PromptMemory(0)
        call.problem = (
            "the cache given to '{site}' holds rows that this model did not read as a prompt (prefix tuning, a cache that another model or "
            "hf_hardattn.soft filled, or one rebuilt from the tensors of another cache), so the prompt cannot be distinguished from what "
            "follows. Start from an empty cache."
        )
    call.memory = memory
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if mask is not None and memory.layers:
        later = mask[:, memory.rows :].bool()
        if count > 1 and not memory.padded:
            memory.padded = not bool(later.all())
        call.later = later if memory.padded else None
    first, held = memory.layers.get(0), cache.get_seq_length()
    if memory.layers and isinstance(held, int):  # a static cache, which counts on its device, cannot be cropped
        _check_cropping(memory, held, memory.rows if first is None else first.count)
    if first is None:
        return
    # Transformers counts the rows in the first layer's cache, where some are missing
    past = held - first.count + memory.rows
    if count > 1:
        _check_length(mask, positions, memory, past + count)
    if positions is None:
        arguments.set("position_ids", (torch.arange(count, device=device) + past).unsqueeze(0))


def _check_cropping(memory: PromptMemory, held: int, count: int) -> None:
    """Refuse a cache from which rows of the prompt were cropped: every layer lost as many, but at other positions of the text.

    Args:
        held: number of rows that the first layer's cache holds. count: number of rows that the prompt left in it.
    """
    missing = count - held
    if missing > 0 and (memory.answer is None or not bool(memory.answer[:, -missing:].all())):
        raise HardAttentionError(
            f"the first layer's cache holds {held} rows where the prompt left {count}; what a selection leaves of a prompt stands at other "
            "positions in each layer, so it cannot be cropped. Crop only what was read after the prompt, or give the shorter prompt anew."
        )


def _check_length(mask: Tensor | None, positions: Any, memory: PromptMemory, length: Any) -> None:
    """Refuse rows that are fed twice, because Transformers takes the length of the first layer's cache for that of the text.

    Args:
        mask: mask of the whole text ``[B, N]``, or None. length: number of rows of the text.
        positions: int64 ``[B, n]``, or ``[k, B, n]`` with those of the text first, unless k = 3 (positions in an image alone).
    """
    length = int(length)
    if mask is not None:
        told: int | None = mask.shape[1]
    elif not isinstance(positions, Tensor) or memory.padded:
        return
    elif positions.dim() == 3 and len(positions) == 3:
        told = None
    else:
        valid = memory.whole.valid
        padding = 0 if valid is None else memory.rows - int(valid.sum(-1).max())
        told = int((positions if positions.dim() == 2 else positions[0]).max()) + 1 + padding
    if told != length:
        raise HardAttentionError(
            f"the cache and this call hold {length} rows of the text, but attention_mask and position_ids count "
            f"{'an unknown number' if told is None else told}; generate() cannot continue from a cache whose first layer holds only a "
            "part of the prompt. Use sites after the first layer, or pass the whole text again."
        )


def _read_labels(call: PromptCall, context: ForwardContext, count: int) -> None:
    """Read the prompt from the labels: it consists of the rows before the first one."""
    labels = context.labels
    if labels is None or labels.dim() != 2 or labels.shape[1] != count or labels.is_floating_point():
        return
    known = labels != -100
    call.answer = known.cumsum(-1) > 0
    if not torch.compiler.is_compiling() and bool(call.answer[:, 0].all()):
        call.problem = (
            "the labels leave no prompt to select from at '{site}': every row is labelled from its first token on. Set the labels of the "
            "prompt to -100, as for any training on answers; selecting among the tokens to predict would reveal their future."
        )


def _unknown_prompt(tower: nn.Module, context: ForwardContext, arguments: Arguments) -> str | None:
    """Return why a generating model cannot tell the prompt from the answer in this call; None if it can."""
    owner: Any = context.owner
    if owner is not None and owner.__dict__.get(CANDIDATES) and context.ids is None:
        return (
            "at '{site}' it is not known which rows belong to an image: "
            + type(owner).__name__
            + " was called without input_ids. Pass input_ids "
            "and pixels, not inputs_embeds."
        )
    if context.labels is not None or not getattr(owner, "can_generate", bool)():
        return None
    uses_cache = arguments.get("use_cache")
    if tower.training and uses_cache is not True:
        return (
            "in training, only labels distinguish the prompt from the answer at '{site}': "
            + type(owner).__name__
            + " got no labels. Pass labels "
            "that are -100 on the prompt (with label_smoothing_factor or compute_loss_func, the Trainer does not pass them to the model)."
        )
    if uses_cache is False:
        return (
            "use_cache=False at '{site}': without a cache, generate() reads the whole text again at each step, and the prompt cannot be "
            "distinguished from the generated tokens. Leave use_cache out, or pass labels that are -100 on the prompt."
        )
    return None


def begin_rows(state: Any, mask: Any, count: int) -> None:
    """Read which rows of a prompt are valid, and which of them are not part of the choice.

    Args:
        state: state of the tower. mask: mask of the first layer with a site. count: N.
    """
    state.begun, state.length = True, count
    valid: Tensor | None = None
    if state.mask is not None:
        valid = state.mask[:, -count:].bool()
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        own = mask[:, 0, :, :count].diagonal(dim1=-2, dim2=-1)  # a valid row reads itself, whatever the window
        valid = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    if valid is not None and not torch.compiler.is_compiling() and bool(valid.all()):
        valid = None
    state.valid = state.prompt.valid = valid
    state.varied = True
    state.always = always_kept(state.prompt.answer, state.prompt.candidates, valid)


def packed_for_flash(arguments: Arguments) -> str | None:
    """Return why a packed text cannot be selected from under flash attention, which tells its documents by their positions; else None."""
    positions = arguments.get("position_ids")
    packed = arguments.get("cu_seq_lens_q") is not None
    if not packed and isinstance(positions, Tensor) and not torch.compiler.is_compiling():
        # flash attention asks the same in each layer; beside a mask, or in a batch of several rows, it reads no documents
        alone = arguments.get("attention_mask") is None and len(positions) == 1
        packed = alone and bool((positions.diff(dim=-1) < 0).any())
    if not packed:
        return None
    return (
        "position_ids start again within the row at '{site}', and flash attention counts the rows of each document, of which a selection "
        "drops some. Use attn_implementation='sdpa' or 'eager', or one document a row."
    )


def warn_of_lost_logits(tower: nn.Module, call: PromptCall, context: ForwardContext) -> None:
    """Warn of logits that nobody should read: those of dropped rows, in a call that does not tell the answer from the prompt."""
    told = call.answer is not None or context.predictions == 1 or context.modes
    if told or tower.training or torch.compiler.is_compiling() or not getattr(context.owner, "can_generate", bool)():
        return
    warnings.warn(
        f"{type(context.owner).__name__} was called without labels, so the whole text was taken for a prompt: the logits of dropped rows are "
        "0, and the others depend on a choice that saw the whole text. To score a text, pass labels that are -100 on its prompt; to continue "
        "it, read the logits of the last row alone (logits_to_keep=1).",
        stacklevel=2,
    )


def always_kept(answer: Tensor | None, candidates: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Return the rows that are not part of the choice.

    These are all rows outside the prompt (or outside an image in it), and the prompt's last row, from which the answer begins.

    Args:
        answer, candidates, valid: bool ``[B, N]``, or None, see ``PromptCall``.

    Returns:
        Bool ``[B, N]``; None if only the last row is not part of the choice.
    """
    if answer is None and candidates is None:
        return None
    known = [rows for rows in (None if answer is None else ~answer, valid) if rows is not None]
    prompt = known[0] if known else torch.ones_like(candidates)  # type: ignore[arg-type]
    prompt = prompt & known[1] if len(known) > 1 else prompt
    place = torch.arange(prompt.shape[1], device=prompt.device)
    last = torch.where(prompt, place, -1).amax(-1, keepdim=True)
    free = prompt if candidates is None else prompt & candidates
    return ~free | (place == last)
