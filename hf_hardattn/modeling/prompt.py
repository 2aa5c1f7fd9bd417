"""What a decoder's call knows about its prompt, and the record of the rows that a selection left in its cache."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from .arguments import Arguments
from .context import ForwardContext
from .plan import TowerPlan

CANDIDATES = "hard_attention_candidates"  # ids of a model's tokens that represent an image's rows
MEMORY = "hard_attention_prompt"  # attribute of a cache: its PromptMemory


class CachedRows:
    """The rows of a prompt that one layer's cache holds, before the rows generated since.

    It is a plain class, because layers whose caches hold the same rows share one instance and recognise it by its identity. It has no
    ``__slots__``, because exporters take a cache apart by the attributes of its contents.

    Attributes:
        count: K, number of rows. valid: bool ``[B, K]``, rows that may be read; None if all may.
        positions: int64 ``[B, K]``, their positions in the prompt; None if no row of it is missing.
    """

    def __init__(self, count: int, valid: Tensor | None, positions: Tensor | None):
        self.count, self.valid, self.positions = count, valid, positions


class PromptMemory:
    """The record stored with the cache of a prompt. The beams of one prompt share it, so it needs no reordering; see ``attach_memory``.

    Attributes:
        rows: N, rows of the prompt. whole: the record of layers that hold all of them.
        layers: dict from layer to the rows that its cache holds, if some are missing.
        padded: later calls of several rows were padded.
    """

    def __init__(self, rows: int, valid: Tensor | None):
        self.rows, self.whole = rows, CachedRows(rows, valid, None)
        self.layers: dict[int, CachedRows] = {}
        self.padded = False

    def of(self, layer: int) -> CachedRows | None:
        """Return the rows that a layer's cache holds; None if the mask made by Transformers fits it."""
        known = self.layers.get(layer)
        if known is not None or not self.layers or min(self.layers) > layer:
            return known
        return self.whole  # Transformers sizes its mask by the first layer, whose cache is shorter


def attach_memory(cache: Any, memory: PromptMemory, drawn: bool) -> None:
    """Attach a memory to a cache.

    Args:
        drawn: choices are drawn, so that beams of one prompt keep different rows and the memory must be reordered with them.
    """
    setattr(cache, MEMORY, memory)
    if drawn:
        cache.__dict__["reorder_cache"] = functools.partial(_reorder, cache)


def _reorder(cache: Any, beams: Tensor) -> None:
    """Reorder a cache whose beams keep different rows, together with its memory."""
    type(cache).reorder_cache(cache, beams)
    memory: PromptMemory = getattr(cache, MEMORY)
    # layers that share a record continue to share it
    for record in {id(rows): rows for rows in memory.layers.values()}.values():
        for name in ("valid", "positions"):
            rows = getattr(record, name)
            if rows is not None:
                setattr(record, name, rows.index_select(0, beams.to(rows.device)))


class PromptCall:
    """One call of a decoder.

    Attributes:
        memory: memory of the cache that earlier calls filled; None while the prompt is read.
        candidates: bool ``[B, N]``, rows of an image; None if the choice is among all rows of the prompt.
        answer: bool ``[B or 1, N]``, rows that are not part of the prompt: from the first label on, or drafted by assisted decoding; None
            if all are the prompt.
        problem: why nothing can be selected in this call, with a placeholder for the site; None if selection is possible.
        later: mask of the rows generated after the prompt, bool ``[B, M]``; None if every row is valid.
    """

    def __init__(self) -> None:
        self.memory: PromptMemory | None = None
        self.candidates: Tensor | None = None
        self.answer: Tensor | None = None
        self.problem: str | None = None
        self.later: Tensor | None = None


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
            cache.__dict__.pop("reorder_cache", None)
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
        memory = PromptMemory(0, None)  # nothing was selected when the cache was filled
        if count > 1:
            call.problem = (
                "the cache given to '{site}' holds rows that this model did not read as a prompt (prefix tuning, or a cache that "
                "another model or hf_hardattn.soft filled), so what follows cannot be told from the prompt. Start from an empty cache."
            )
    call.memory = memory
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and memory.layers:
        later = mask[:, memory.rows :].bool()
        if count > 1 and not memory.padded:
            memory.padded = not bool(later.all())
        call.later = later if memory.padded else None
    first = memory.layers.get(0)
    if first is not None and count > 1 and not memory.padded:
        _check_length(arguments.get("position_ids"), memory, cache.get_seq_length() - first.count + memory.rows + count)
    if arguments.get("position_ids") is None and first is not None:
        # Transformers counts the rows in the first layer's cache, where some are missing
        past = cache.get_seq_length() - first.count + memory.rows
        arguments.set("position_ids", (torch.arange(count, device=device) + past).unsqueeze(0))


def _check_length(positions: Any, memory: PromptMemory, length: Any) -> None:
    """Refuse rows that are fed twice, because Transformers takes the length of the first layer's cache for that of the text.

    Args:
        positions: int64 ``[B, n]``, or ``[4, B, n]`` with those of the text first; other shapes are not checked. length: number of rows
            of the text.
    """
    if not isinstance(positions, Tensor) or positions.dim() == 3 and len(positions) != 4:
        return
    last = int((positions if positions.dim() == 2 else positions[0]).max())
    valid = memory.whole.valid
    padding = 0 if valid is None else memory.rows - int(valid.sum(-1).max())
    if last + 1 != int(length) - padding:
        raise HardAttentionError(
            f"the last of position_ids is {last} where the cache and this call hold {int(length) - padding} rows of the text; generate() cannot "
            "go on from a cache whose first layer holds a part of the prompt. Use sites behind the first layer, or give it the whole text anew."
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
            "prompt to -100, as for any training on answers; a choice among the tokens to predict would let them see their future."
        )


def _unknown_prompt(tower: nn.Module, context: ForwardContext, arguments: Arguments) -> str | None:
    """Return why a generating model cannot tell the prompt from the answer in this call; None if it can."""
    owner: Any = context.owner
    if owner is not None and owner.__dict__.get(CANDIDATES) and context.ids is None:
        return (
            "nothing tells at '{site}' which rows are an image's: "
            + type(owner).__name__
            + " was called without input_ids. Pass input_ids "
            "and pixels, not inputs_embeds."
        )
    if context.labels is not None or not getattr(owner, "can_generate", bool)():
        return None
    uses_cache = arguments.get("use_cache")
    if tower.training and uses_cache is not True:
        return (
            "in training nothing tells the prompt from the answer at '{site}': "
            + type(owner).__name__
            + " got no labels. Pass labels "
            "that are -100 on the prompt (the Trainer keeps them back with label_smoothing_factor and compute_loss_func)."
        )
    if uses_cache is False:
        return (
            "use_cache=False at '{site}': without a cache generate() reads the whole text again at each step, and nothing tells what it wrote "
            "from the prompt. Leave use_cache out, or pass labels that are -100 on the prompt."
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
    state.valid = valid
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
