"""Kept places in units that people understand: characters of a text, boxes of pixels, seconds of a video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import HardAttentionError
from ..modeling.selection import Selection
from ..recording import Recording


def kept_places(recording: Recording, site: str) -> Tensor:
    """Return the places that the first call at ``site`` kept for any head or query, bool ``[B, P]`` over the tower's input.

    Raises:
        HardAttentionError: the recording has no such site; the message lists those it has.
    """
    return recording.kept(recording[site][0]).flatten(1, 2).any(1)


def kept_per_token(recording: Recording, site: str, beam_indices: Tensor | None = None) -> Tensor:
    """Return the places that ``site`` kept for each generated token (any head): the choice made at the query that predicted it.

    Args:
        recording: of one ``generate()`` call.
        beam_indices: int64 ``[B, T]`` from ``generate(..., return_dict_in_generate=True)`` with beams: the row of each step
            that the returned sequence came from; -1 after its end.

    Returns:
        bool ``[B, T, P]``; all False after the end of a sequence if ``beam_indices`` is given.
    """
    selections: list[Selection] = recording[site]
    once = (
        selections[0].mask.shape[2] == 1 and len(selections) == 1
    )  # one choice serves every step: its keys are cached
    steps = [recording.kept(selection)[:, :, -1].any(1) for selection in selections]
    if beam_indices is None:
        return torch.stack(steps, 1)
    rows, count = beam_indices.long().cpu(), beam_indices.shape[1]
    if not once and len(steps) < int((rows >= 0).sum(-1).max()):
        raise HardAttentionError(
            f"the recording holds {len(steps)} selections at '{site}' and the sequences have "
            f"{int((rows >= 0).sum(-1).max())} tokens; record exactly the generate() call that returned beam_indices."
        )
    kept = [
        steps[0 if once else t].cpu()[rows[:, t].clamp(min=0)] for t in range(min(count, count if once else len(steps)))
    ]
    found = torch.stack(kept, 1)
    return found & (rows[:, : found.shape[1], None] >= 0)


def spans_per_token(
    recording: Recording,
    site: str,
    offsets: Sequence[Sequence[tuple[int, int]]],
    beam_indices: Tensor | None = None,
) -> list[list[list[tuple[int, int]]]]:
    """Return the characters of the source that each generated token could read: for each row and token, a list of (start, end) spans.

    Args:
        recording: see ``kept_per_token``.
        site: see ``kept_per_token``.
        offsets: offsets of the source tokens of each row, see ``character_spans``.
        beam_indices: see ``kept_per_token``.
    """
    kept = kept_per_token(recording, site, beam_indices)
    if len(offsets) != len(kept):
        raise HardAttentionError(
            f"{len(offsets)} lists of offsets for {len(kept)} generated rows; pass one per row, repeated for rows of the same source."
        )
    return [[character_spans(token, spans) for token in row] for row, spans in zip(kept, offsets, strict=True)]


def character_spans(kept: Tensor, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the characters of a text that the kept tokens cover; touching spans are merged.

    Args:
        kept: bool ``[P]``, one row of ``kept_places``.
        offsets: (start, end) of each token, as returned by a fast tokenizer with ``return_offsets_mapping=True``; special tokens
            have start = end and cover nothing.
    """
    if len(offsets) > len(kept):
        raise HardAttentionError(
            f"{len(offsets)} offsets for {len(kept)} positions; each token has one. Use the same tokenizer call for both."
        )
    if bool(kept[len(offsets) :].any()):
        raise HardAttentionError(
            f"{len(offsets)} offsets for {len(kept)} positions, and one after the last offset is kept; only padding on the right has no "
            "offset. Use the same tokenizer call for both."
        )
    spans: list[tuple[int, int]] = []
    for keep, (start, end) in zip(kept.tolist(), offsets, strict=False):
        if not keep or start == end:
            continue
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def pixel_boxes(
    kept: Tensor, patch_size: int, model_size: tuple[int, int], image_size: tuple[int, int] | None = None
) -> list[tuple[float, float, float, float]]:
    """Return boxes (left, top, right, bottom) of the kept patches, in pixels, row by row.

    Args:
        kept: bool ``[CLS and registers + patches]``.
        model_size: (height, width) of the image that the model reads. image_size: (height, width) of the original image before
            resizing, in whose pixels the boxes are then given; ``model_size`` by default.
    """
    height, width = model_size
    across, down = width // patch_size, height // patch_size
    first = len(kept) - across * down
    if not 0 <= first < max(across * down, 2):
        raise HardAttentionError(
            f"{len(kept)} positions do not fit {down} x {across} patches of {patch_size} pixels and CLS; check patch_size and model_size."
        )
    tall, wide = image_size or model_size
    y, x = patch_size * tall / height, patch_size * wide / width
    places = kept[first:].nonzero().flatten().tolist()
    return [(p % across * x, p // across * y, (p % across + 1) * x, (p // across + 1) * y) for p in places]


def frame_places(kept: Tensor, frames: int, patches: bool = False) -> Tensor:
    """Return the kept places of a video by frame, bool ``[F, P]``: P patches of each frame, or P = 1 if a frame is one place.

    Args:
        kept: bool, one row of ``kept_places``: ``[1 + F * P]`` for a vision tower that reads videos, CLS first; or one place per frame,
            possibly followed by others (``</s>`` or padding).
        frames: F, the number of frames. patches: a frame is a set of patches, as in a vision tower, and not one place.
    """
    rest = (len(kept) - 1) % frames if patches and frames else 0
    if not 0 < frames <= len(kept) - patches or rest:
        unit = "the same number of patches, after CLS" if patches else "one position"
        raise HardAttentionError(f"{frames} frames for {len(kept)} positions; each frame has {unit}.")
    return kept[1:].unflatten(0, (frames, -1)) if patches else kept[:frames, None]


def frame_times(kept: Tensor, timestamps: Sequence[float], patches: bool = False) -> list[float]:
    """Return the timestamps, in seconds, of the frames that keep a place; one timestamp per frame, the rest as in ``frame_places``."""
    held = frame_places(kept, len(timestamps), patches).any(-1).tolist()
    return [time for keep, time in zip(held, timestamps, strict=True) if keep]
