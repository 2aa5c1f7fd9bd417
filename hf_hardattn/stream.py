"""The tokens that travel through a tower: which of them are still there, and what their gates are."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, overload

import torch
from torch import Tensor

from .attention import as_bool, keep_rows, restore_rows
from .packing import Packing
from .scorers import Projections
from .selection import Selection, mask_to_indices
from .selector import Selector


@dataclass
class Pass:
    """One forward pass of a whole model; the model's hooks open it and read it, the towers fill it.

    Attributes:
        selections: every selection made, in order.
        gates: tower name to fp32 ``[B, N]``: gates of its output rows, for a tower that reads them (masked training).
        as_tuple: the caller asked for a tuple.
        shares_gates: a later tower reads the gates, so the rows of dropped positions stay whole in masked training.
        terms: what the estimators added to the task loss, ``[]``; None when they added nothing.
    """

    shares_gates: bool = False
    as_tuple: bool = False
    selections: list[Selection] = field(default_factory=list)
    gates: dict[str, Tensor] = field(default_factory=dict)
    terms: Tensor | None = None


@dataclass
class Stream:
    """Rows of a residual stream after the selections so far.

    Attributes:
        positions: int64 ``[B, K]``, place of each row in the tower's input; None while all are there.
        valid: bool ``[B, K]``; None when every row counts.
        gates: fp32 ``[B, K]`` of masked training; None otherwise.
        slots: bound of the rows that count; None while nothing was dropped.
        packing: of the rows that count, where their numbers differ and the host knows them; None otherwise.
    """

    positions: Tensor | None = None
    valid: Tensor | None = None
    gates: Tensor | None = None
    slots: int | None = None
    packing: Packing | None = None

    def select(
        self,
        selector: Selector | None,
        hidden: Tensor,
        made: Made,
        projections: Projections | None = None,
        states: Tensor | None = None,
    ) -> tuple[Tensor, Stream]:
        """Choose among the rows of ``hidden`` ``[B, N, D]``, and note the choice in ``made``; gathered execution drops the others. No selector, or
        one that is switched off, leaves all as it is.

        Args:
            states: what a scorer reads that asks for the attention's projections, ``[B, N, D]``; ``hidden`` by default.
        """
        if selector is None or not selector.enabled:
            return hidden, self
        valid = self.valid
        if self.gates is not None:
            present = self.gates.detach() > 0
            valid = present if valid is None else valid & present
        states = states if states is not None and selector.scorer.needs_projections else hidden
        features = selector.keys(states, valid, projections=projections)
        required = required_rows(selector.always, (hidden.shape[0], hidden.shape[1]), valid, hidden.device)
        context = selector.context(states, valid)
        selection = selector(features, as_keys(valid), as_keys(required), most=self.slots, context=context)
        selection.positions = self.positions
        made.append(selection)
        stream, indices = self.after(selector, selection, (hidden.shape[0], hidden.shape[1]))
        return hidden if indices is None else keep_rows(hidden, indices), stream

    def after(self, selector: Selector, selection: Selection, shape: tuple[int, int]) -> tuple[Stream, Tensor | None]:
        """The stream behind a selection among its rows, and which of them go on, int64 ``[B, K]``; None: all stay in place.

        Args:
            shape: (B, N) of the rows.
        """
        known = selector.data_dependent or selection.lengths is not None
        if selector.replayed is not None:  # a choice that was given may keep all of one row and little of another
            known = known or bool((selection.mask != selection.valid).any())
        if selection.gates is None and selection.slots >= shape[1] and not known:
            return self, None  # everything valid is kept
        if selector.masked:
            gates, rows = self.gates, selection.mask[:, 0, 0].expand(shape)
            if selection.gates is not None:
                made = selection.gates[:, 0, 0]
                return Stream(
                    self.positions, self.valid, made if gates is None else gates * made, selection.slots
                ), None
            return Stream(self.positions, rows, gates, selection.slots), None
        indices = selection.indices[:, 0, 0].expand(shape[0], -1)
        kept = None if selection.dense else selection.slot_mask[:, 0, 0].expand(shape[0], -1)
        positions = indices if self.positions is None else self.positions.gather(1, indices)
        gates = None if self.gates is None else self.gates.gather(1, indices)
        lengths = selection.lengths
        if lengths is None and self.packing is not None and kept is not None:
            lengths = tuple(kept.sum(-1).tolist())  # of rows that differed in number before
        packing = Packing.of(lengths, selection.slots, selection.mask.device)
        return Stream(positions, kept, gates, selection.slots, packing), indices

    def finish(self, hidden: Tensor, length: int, restore: bool, keep_gated: bool) -> Tensor:
        """What the tower hands on: an all-zero row means that nothing was computed there.

        Args:
            hidden: ``[B, K, D]`` after the last layer. length: N of the tower's input.
            restore: give the rows their places in ``[B, length, D]`` again.
            keep_gated: leave the rows of dropped positions whole: their reader has the gates.
        """
        if self.slots is None:
            return hidden
        if self.gates is not None:
            gates = self.gates
            if (
                self.slots >= length and self.valid is not None
            ):  # nothing was dropped: padding rows stay what stock makes them
                gates = gates.masked_fill(~self.valid, 1.0)
            return hidden if keep_gated else hidden * gates.unsqueeze(-1).to(hidden.dtype)
        valid, positions = self.valid, self.positions
        if positions is None:  # masked execution in evaluation: same outcome as the gathered one
            if restore:
                return hidden if valid is None else hidden.masked_fill(~valid.unsqueeze(-1), 0.0)
            if valid is None:
                return hidden
            positions = mask_to_indices(valid, self.slots)
            hidden, valid = keep_rows(hidden, positions), valid.gather(1, positions)
        if restore:
            return restore_rows(hidden, positions, valid, length)
        return hidden if valid is None else hidden.masked_fill(~valid.unsqueeze(-1), 0.0)

    def mask(self, given: Tensor | None, implementation: str, dtype: torch.dtype) -> Tensor | None:
        """The attention mask over the rows, as the attention implementation reads it; ``given`` while nothing was dropped."""
        if self.slots is None:
            return given
        if self.valid is None:
            return None
        allowed = as_keys(self.valid)
        if implementation == "sdpa":
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def flatten(self) -> tuple[Any, ...]:
        """Tensors and numbers, to pass through gradient checkpointing."""
        return self.positions, self.valid, self.gates, self.slots, self.packing


def place(selections: list[Selection], stream: Stream) -> None:
    """Tell the selections among a tower's own keys where those keys stood in its input."""
    for selection in selections:
        if ".self." in selection.site:
            selection.positions = stream.positions


class Made(list[Selection]):
    """What a layer selected, in order.

    Attributes:
        columns: bias towards the kept keys ``[B or 1, H, Q, K]``, where later layers share the choice; else None.
    """

    columns: Tensor | None = None


STREAM_LEAVES = len(fields(Stream))
SELECTION_LEAVES = tuple(f.name for f in fields(Selection))


def pack(stream: Stream, made: Made) -> tuple[Any, ...]:
    """Flatten what a layer returns besides its output: gradient checkpointing follows tensors in a flat tuple only."""
    return (*stream.flatten(), made.columns, *(getattr(s, name) for s in made for name in SELECTION_LEAVES))


def unpack(leaves: tuple[Any, ...]) -> tuple[Stream, Made]:
    """Inverse of ``pack``."""
    rest, size = leaves[STREAM_LEAVES + 1 :], len(SELECTION_LEAVES)
    made = Made(Selection(*rest[i : i + size]) for i in range(0, len(rest), size))
    made.columns = leaves[STREAM_LEAVES]
    return Stream(*leaves[:STREAM_LEAVES]), made


def mask_rows(mask: Tensor | None, batch: int) -> Tensor | None:
    """Which rows a bidirectional attention mask ``[B, 1, Q or 1, N]`` lets be read, bool ``[B, N]``; None for all."""
    allowed = as_bool(mask)
    return None if allowed is None else allowed[:, 0, 0].expand(batch, -1)


@overload
def as_keys(rows: Tensor) -> Tensor: ...
@overload
def as_keys(rows: None) -> None: ...
def as_keys(rows: Tensor | None) -> Tensor | None:
    """``[B, N]`` to ``[B, 1, 1, N]``; what has four dimensions stays as it is."""
    return rows if rows is None or rows.dim() == 4 else rows[:, None, None, :]


def required_rows(
    always: str | None, shape: tuple[int, int], valid: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which rows are kept always: ``"first"`` (CLS), ``"last"`` valid one (``</s>``) or None; bool ``[B, N]``."""
    if always is None:
        return None
    place = torch.arange(shape[1], device=device).expand(shape)
    if always == "first":
        return place == 0
    if valid is None:
        return place == shape[1] - 1
    return place == torch.where(valid, place, -1).amax(-1, keepdim=True)
