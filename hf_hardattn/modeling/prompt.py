"""What a call of a decoder knows of its prompt, and what its cache remembers of the rows that a selection left there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from ..errors import HardAttentionError
from .arguments import Arguments
from .context import ForwardContext
from .masks import additive
from .plan import TowerPlan

MEMORY = "hard_attention_prompt"  # attribute of a cache: its PromptMemory
_BY_POSITION = ("sdpa", "eager", "flex_attention")  # implementations that read a mask of each query


class CachedRows:
    """The rows of a prompt that one layer's cache holds, in front of what was written since.

    A plain class: layers whose caches hold the same rows share one, and know it by its identity.

    Attributes:
        count: K. valid: bool ``[B, K]``, rows that may be read; None when all.
        positions: int64 ``[B, K]``, where they stood in the prompt; None when all of it is there.
    """

    __slots__ = ("count", "valid", "positions")

    def __init__(self, count: int, valid: Tensor | None, positions: Tensor | None):
        self.count, self.valid, self.positions = count, valid, positions


class PromptMemory:
    """What stands beside the cache of a prompt. The beams of one prompt share it, so it needs no reordering.

    Attributes:
        rows: N of the prompt. whole: the record of layers that hold all of it.
        layers: layer to the rows that its cache holds, where some are missing.
        padded: later calls of several rows were padded.
    """

    def __init__(self, rows: int, valid: Tensor | None):
        self.rows, self.whole = rows, CachedRows(rows, valid, None)
        self.layers: dict[int, CachedRows] = {}
        self.padded = False

    def of(self, layer: int) -> CachedRows | None:
        """The rows that a layer's cache holds; None where the mask that Transformers made fits it."""
        known = self.layers.get(layer)
        if known is not None or not self.layers or min(self.layers) > layer:
            return known
        return self.whole  # Transformers sizes its mask by the first layer, whose cache is shorter


class PromptCall:
    """One call of a decoder.

    Attributes:
        memory: of the cache that earlier calls filled; None while the prompt is read.
        answer: bool ``[B or 1, N]``, rows that are no prompt: from the first label on, or those that assisted decoding drafts; None
            when all are the prompt.
        problem: why nothing can be selected in this call, with a place for the site; None when it can.
        later: mask of what was written since the prompt, bool ``[B, M]``; None when every row counts.
    """

    def __init__(self) -> None:
        self.memory: PromptMemory | None = None
        self.answer: Tensor | None = None
        self.problem: str | None = None
        self.later: Tensor | None = None


class Places(NamedTuple):
    """Maps the rows of a cache to their places in the text, for windows.

    Attributes:
        positions: int64 ``[B, K]`` of the prompt's rows. rows: N of the prompt.
    """

    positions: Tensor
    rows: int

    def of(self, batch: Any, row: Any) -> Any:
        """The place of a row of one example."""
        count = self.positions.shape[1]
        place = self.positions[batch, row.clamp(max=count - 1)]
        return torch.where(row < count, place, row - count + self.rows)


def open_prompt(tower: Any, plan: TowerPlan, context: ForwardContext, arguments: Arguments) -> PromptCall:
    """Find out whether a call reads a prompt or goes on behind one, and what in it is the prompt."""
    call = PromptCall()
    rows = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else arguments.get("inputs_embeds")
    cache, count = arguments.get("past_key_values"), rows.shape[1]
    memory: PromptMemory | None = getattr(cache, MEMORY, None)
    if _is_filled(cache, memory, count):
        _go_on(call, memory, cache, count, rows.device, arguments)
    else:
        if memory is not None:
            delattr(cache, MEMORY)  # of an earlier prompt, in a static cache that is used again
        _read_labels(call, context, count)
        if call.answer is None and 1 < context.predictions <= count:
            # assisted decoding reads its first draft together with the prompt, and asks for logits from the prompt's last row on
            place = torch.arange(count, device=rows.device)
            call.answer = (place > count - context.predictions).unsqueeze(0)
        call.problem = call.problem or _unknown_prompt(tower, context, arguments)
    return call


def _is_filled(cache: Any, memory: PromptMemory | None, count: int) -> bool:
    if cache is None:
        return False
    if memory is not None and count == 1 and torch.compiler.is_compiling():
        return True  # compiled steps of decoding ask the device nothing
    return int(cache.get_seq_length()) > 0


def _go_on(
    call: PromptCall, memory: PromptMemory | None, cache: Any, count: int, device: torch.device, arguments: Arguments
) -> None:
    """A call behind the prompt: it selects nothing."""
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
    if arguments.get("position_ids") is None and first is not None:
        # Transformers counts the rows in the first layer's cache, where some are missing
        past = cache.get_seq_length() - first.count + memory.rows
        arguments.set("position_ids", (torch.arange(count, device=device) + past).unsqueeze(0))


def _read_labels(call: PromptCall, context: ForwardContext, count: int) -> None:
    """Labels mark the prompt: the rows in front of the first one."""
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
    """Why a model that writes cannot tell the prompt from the answer in this call; None where it can."""
    owner: Any = context.owner
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
    """Read which rows of a prompt count, and which of them are no choice.

    Args:
        state: of the tower. mask: of the first layer with a site. count: N.
    """
    state.begun, state.length = True, count
    valid: Tensor | None = None
    if state.mask is not None:
        valid = state.mask[:, -count:].bool()
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        own = mask[:, 0, :, :count].diagonal(dim1=-2, dim2=-1)  # a row that counts reads itself, whatever the window
        valid = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    if valid is not None and not torch.compiler.is_compiling() and bool(valid.all()):
        valid = None
    state.valid = valid
    state.always = always_kept(state.prompt.answer, valid)


def always_kept(answer: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The rows that are no choice, bool ``[B, N]``: all but the prompt's, and the last of those, from which the answer begins."""
    if answer is None:
        return None
    free = ~answer if valid is None else ~answer & valid
    place = torch.arange(free.shape[1], device=free.device)
    last = torch.where(free, place, -1).amax(-1, keepdim=True)
    return ~free | (place == last)


def prefill_mask(
    state: Any, config: Any, hidden: Tensor, given: Any, cache: Any, layer: int, window: int | None
) -> Any:
    """The mask over the rows that a selection left of the prompt.

    Args:
        given: over all of its rows, in any form.
    """
    positions, valid = state.positions, state.valid
    if isinstance(given, Tensor) and given.dim() == 2:
        return valid  # flash attention reads which rows count
    if given is None and valid is None and window is None:
        return None
    if not isinstance(given, Tensor):
        places = None if positions is None else Places(positions, state.length)
        return rows_mask(CachedRows(hidden.shape[1], valid, positions), config, hidden, cache, layer, window, places)
    count = hidden.shape[1]
    if positions is not None:
        # rows and columns of the caller's mask: windows, packed texts and masks of the user's stay what they are
        batch = len(positions)
        rows = positions[:, None, :, None].expand(-1, given.shape[1], -1, given.shape[-1])
        columns = positions[:, None, None, :].expand(-1, given.shape[1], count, -1)
        given = given.expand(batch, -1, -1, -1).gather(2, rows).gather(3, columns)
        width = count if cache is None else cache.get_mask_sizes(count, layer)[0]
        hidden_value: Any = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
        given = nn.functional.pad(given, (0, width - count), value=hidden_value)
    if valid is None:
        return given
    used = nn.functional.pad(valid, (0, given.shape[-1] - count), value=True)[:, None, None]
    return given & used if given.dtype == torch.bool else given.masked_fill(~used, torch.finfo(given.dtype).min)


def step_mask(
    rows: CachedRows,
    later: Tensor | None,
    config: Any,
    hidden: Tensor,
    cache: Any,
    layer: int,
    window: int | None,
    n: int,
) -> Any:
    """The mask of rows behind a prompt, over the cache of one layer.

    Args:
        later: mask of what was written since, bool ``[B, M]``, or None. n: rows of the prompt.
    """
    fixed = cache.layers[layer].is_compileable
    if hidden.shape[1] == 1 and rows.valid is None and later is None and window is None and not fixed:
        return None
    places = None if rows.positions is None else Places(rows.positions, n)
    return rows_mask(rows, config, hidden, cache, layer, window, places, later)


def rows_mask(
    rows: CachedRows,
    config: Any,
    hidden: Tensor,
    cache: Any,
    layer: int,
    window: int | None,
    places: Places | None,
    later: Tensor | None = None,
) -> Any:
    """A causal mask over the rows that a layer's cache holds and those of this call, in the form of the implementation.

    A window is a matter of places in the text. The cache of a sliding layer forgets by number, and so never too early.
    """
    if window is not None and config._attn_implementation not in _BY_POSITION:
        raise HardAttentionError(
            f"attn_implementation='{config._attn_implementation}' counts the rows of a sliding window, of which a selection leaves gaps. "
            "Use attn_implementation='sdpa', 'eager' or 'flex_attention'."
        )
    queries = hidden.shape[1]
    width, offset = (queries, 0) if cache is None else cache.get_mask_sizes(queries, layer)
    full = None
    if rows.valid is not None or later is not None:
        kept = hidden.new_ones(len(hidden), rows.count, dtype=torch.bool) if rows.valid is None else rows.valid
        full = kept if later is None else torch.cat((kept, later.to(kept.device)), 1)
        full = nn.functional.pad(full, (0, max(0, width + offset - full.shape[1])), value=True)
    extra: dict[str, Any] = {}
    if window is not None:
        extra["and_mask_function"] = lambda b, h, q, kv: _place(places, b, q) - _place(places, b, kv) < window
    return create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=full, past_key_values=cache, layer_idx=layer, **extra
    )


def _place(places: Places | None, batch: Any, row: Any) -> Any:
    return row if places is None else places.of(batch, row)


def dense_mask(state: Any, hidden: Tensor, window: int | None) -> Tensor:
    """Which keys each row of a prompt and its answer may read, bool ``[B or 1, 1, N, N]``, for attention computed here."""
    count = hidden.shape[1]
    places = torch.arange(count, device=hidden.device).unsqueeze(0) if state.positions is None else state.positions
    distance = places[:, :, None] - places[:, None, :]
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    allowed = allowed.unsqueeze(1)
    return allowed if state.valid is None else allowed & state.valid[:, None, None]


def as_form(allowed: Tensor, implementation: str, dtype: torch.dtype, site: str) -> Tensor:
    """A bool mask of each query as the attention implementation reads it.

    Raises:
        HardAttentionError: it reads no such mask.
    """
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        return additive(allowed, dtype)
    raise HardAttentionError(
        f"attn_implementation='{implementation}' at '{site}' with labels: the answer reads fewer keys than the prompt does, which takes a mask of "
        "each query. Use attn_implementation='sdpa' or 'eager'."
    )
