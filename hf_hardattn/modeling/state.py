"""The rows of one tower during one call: which ones are left, and what later layers share as a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.attention import as_bool, keep_rows, restore_rows
from ..functional.topk import mask_to_indices
from ..functional.varlen import Packing
from .arguments import Arguments
from .context import ForwardContext
from .plan import LayerPlan
from .selection import Selection


class KeySubset(NamedTuple):
    """The keys that a choice leaves to an attention, with one choice for all queries of a row.

    Attributes:
        indices: int64 ``[B, H or 1, K]``, ascending; None while all N keys are present.
        valid: bool, broadcastable to ``[B, H, 1, K or N]``; None if every key is valid.
        gates: fp32, broadcastable to ``[B, H, 1, N]``, from masked training; None otherwise.
        bias: position bias of the kept keys, ``[B or 1, H, Q, K]``, once gathered; None if there is none.
        packing: packing of the kept keys, if rows keep different counts and the host knows them; None otherwise.
        total: N, number of keys among which the choice was made.
    """

    indices: Tensor | None = None
    valid: Tensor | None = None
    gates: Tensor | None = None
    bias: Tensor | None = None
    packing: Packing | None = None
    total: int = 0

    @classmethod
    def of(cls, selection: Selection) -> KeySubset:
        """Create the subset from a selection that serves all queries of a row (Q = 1)."""
        total = selection.scores.shape[-1]
        everything = selection.slots >= total
        if selection.gates is not None:
            return cls(valid=selection.valid, gates=selection.gates, total=total)
        packing = Packing.of(selection.lengths, selection.slots, selection.scores.device)
        if packing is None and (selection.masked or everything):
            return cls(valid=None if everything and selection.dense else selection.mask, total=total)
        return cls(selection.indices[:, :, 0], selection.slot_valid, packing=packing, total=total)


class PendingChoice:
    """A choice that is to be made inside an attention, from the states that it receives.

    It is a plain class, so that nothing takes it apart on the way.

    Attributes:
        plan: plan of the layer. context: context of the model's call. state: state of the tower.
    """

    __slots__ = ("plan", "context", "state")

    def __init__(self, plan: LayerPlan, context: ForwardContext, state: TowerState):
        self.plan, self.context, self.state = plan, context, state


class AttentionInput(NamedTuple):
    """What a layer passes to its attention in place of the mask, if the attention has more to do than the stock one.

    It is passed in the mask argument, the one argument that every layer passes on unchanged.

    Attributes:
        mask: the mask of the rows, in the form the attention implementation reads.
        keys: the keys left by a site of this layer, or of an earlier layer whose choice it shares.
        gates: fp32 ``[B, N]``, from masked training at earlier sites; None otherwise.
        packing: packing of the layer's rows end to end; None if they are a padded batch.
        bias: position bias of the rows, if the attention would compute it from their indices; None otherwise.
        pending: a choice that is to be made inside the attention; None otherwise.
        weights: the caller requested attention weights.
        places: position of each key in the input of the tower that it comes from, int64 ``[B, N]``, and the number of rows there, for
            the weights; None if these are the keys themselves.
    """

    mask: Any = None
    keys: KeySubset | None = None
    gates: Tensor | None = None
    packing: Packing | None = None
    pending: PendingChoice | None = None
    bias: Tensor | None = None
    weights: bool = False
    places: tuple[Tensor, int] | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the mask that a layer with a site passes to its attention has no {name!r}: it also carries the selection. The mask itself is its "
            "attribute 'mask', None where nothing is masked."
        )


class TowerState:
    """The rows of a tower after the selections so far.

    Attributes:
        length: N, rows of the tower's input.
        mask: the 2-D mask that the caller gave the tower, or None.
        valid: bool ``[B, K]``, rows that are not padding; None if there is no padding.
        chosen: bool ``[B, K]``, rows that masked selections have kept so far; None if there were none.
        gates: fp32 ``[B, K]``, from masked training; None otherwise.
        bound: upper bound of the valid rows of an example; None while nothing has been dropped.
        packing: packing of the valid rows, if their numbers differ and the host knows them; None otherwise.
        leaders: dict from site to the keys it left, for later layers that share its choice.
        dropped: some rows are no longer computed, or no longer visible.
        begun: ``begin`` has read which rows are valid.
        grid: number of patches down and across the image that the rows came from; None for other inputs.
        per_query: the caller's mask differs between queries.
        source_valid: bool ``[B, M]``, valid rows of the tower that its cross-attention reads; None if all are valid.
        source_gates: fp32 ``[B, M]``, from masked training in that tower; None otherwise.
        source_dropped: that tower dropped rows.
        source_places: position of each of its rows in its input, int64 ``[B, M]``, and the number of rows there; None if all are
            there, or nobody asks for attention weights.
        output_valid: rows of the tower's output that a reader may read, bool; None if it may read all, or while the tower runs.
        output_places: the same of this tower's output, for a reader.
        always: bool ``[B, K]``, rows that are not part of the choice in this call (an answer, words beside an image); None if these are
            just the tower's protected rows.
        varied: their number differs between the rows of the batch; otherwise it is that of the tower's protected rows.
        prompt: the ``PromptCall`` of a tower that reads a prompt; None in other towers.
        keys: the choice of the ``self`` site of the layer that is running, in such a tower.
        key_leaders: dict from site to its choice in such a tower, for later layers that share it.
    """

    def __init__(self, mask: Tensor | None = None):
        self.length = 0
        self.mask = mask
        self.valid: Tensor | None = None
        self.chosen: Tensor | None = None
        self.gates: Tensor | None = None
        self.bound: int | None = None
        self.packing: Packing | None = None
        self.leaders: dict[str, KeySubset] = {}
        self.dropped = False
        self.begun = False
        self.grid: tuple[int, int] | None = None
        self.per_query = False
        self.source_valid: Tensor | None = None
        self.source_gates: Tensor | None = None
        self.source_dropped = False
        self.source_places: tuple[Tensor, int] | None = None
        self.output_valid: Tensor | None = None
        self.output_places: tuple[Tensor, int] | None = None
        self.always: Tensor | None = None
        self.varied = False
        self.prompt: Any = None
        self.keys: Selection | None = None
        self.key_leaders: dict[str, Selection] = {}
        self._steps: list[Tensor] = []
        self._shared: list[tuple[Any, Any, Any]] = []
        self._asked: bool | None = None

    def begin(self, length: int, mask: Any) -> None:
        """Read which rows are valid, before the first selection.

        Args:
            length: N. mask: mask of the first layer with a site, in any form.
        """
        self.begun, self.length = True, length
        if isinstance(mask, Tensor) and mask.dim() == 4:
            per_query = mask.shape[2] > 1 and mask.stride(2) != 0
            rows: Any = as_bool(mask)
            if per_query and self.mask is None:
                # the caller's own mask, or a window: a row is valid if any query may read it
                self.per_query = True
                self.valid = rows.any(2)[:, 0]
            else:
                self.valid = self.mask.bool() if per_query and self.mask is not None else rows[:, 0, 0]
        elif mask is not None:
            self.valid = mask.bool() if isinstance(mask, Tensor) else None if self.mask is None else self.mask.bool()

    @property
    def is_dense(self) -> bool:
        """Whether every row counts, and all count equally, so that a layer needs nothing but the rows."""
        return self.valid is None and self.chosen is None and self.gates is None and self.packing is None

    @property
    def candidates(self) -> Tensor | None:
        """Rows that a selection may keep, bool ``[B, K]``; None if it may keep all."""
        if self.chosen is None:
            return self.valid
        return self.chosen if self.valid is None else self.valid & self.chosen

    @property
    def positions(self) -> Tensor | None:
        """Position of each row in the tower's input, int64 ``[B, K]``; None while no row has been removed."""
        if not self._steps:
            return None
        while len(self._steps) > 1:
            first, second, *rest = self._steps
            self._steps = [first.gather(1, second), *rest]
        return self._steps[0]

    def apply(self, selection: Selection, batch: int, rows: int) -> Tensor | None:
        """Apply a selection to the rows.

        Args:
            batch, rows: B and K before the selection.

        Returns:
            The indices of the remaining rows, int64 ``[B, K']``; None if all stay where they are.
        """
        if selection.gates is None and selection.slots >= rows and selection.lengths is None and not selection.counted:
            return None  # everything valid is kept
        self.dropped, self.bound = True, selection.slots
        self._shared.clear()
        if selection.masked:
            kept = selection.mask[:, 0, 0].expand(batch, rows)
            self.chosen = kept if self.chosen is None else self.chosen & kept
            if selection.gates is None:
                self.valid = kept  # masked execution in evaluation: dropped rows are hidden like padding
            else:
                gates = selection.gates[:, 0, 0]
                self.gates = gates if self.gates is None else self.gates * gates
            return None
        indices = selection.indices[:, 0, 0].expand(batch, -1)
        valid = selection.slot_valid
        valid = None if valid is None else valid[:, 0, 0].expand(batch, -1)
        lengths = selection.lengths
        if self.prompt is not None:
            lengths = None  # a cache holds a padded batch, not packed rows
            indices, valid = unused_first(indices, valid)
        if lengths is None and self.packing is not None and valid is not None:
            lengths = tuple(valid.sum(-1).tolist())  # the rows were packed before this selection
        self.packing = Packing.of(lengths, selection.slots, indices.device)
        self._steps.append(indices)
        self.valid, self.chosen = valid, None
        self.gates = None if self.gates is None else self.gates.gather(1, indices)
        self.always = None if self.always is None else self.always.expand(batch, -1).gather(1, indices)
        return indices

    def shared(self, original: Any, make: Callable[[], Any], purpose: Any = None) -> Any:
        """Return the result of ``make`` for ``original``, made once for all layers until the next selection.

        Args:
            purpose: distinguishes several results made from one original, such as the masks of several sliding windows.
        """
        for known, use, made in self._shared:
            if known is original and use == purpose:
                return made
        made = make()
        self._shared.append((original, purpose, made))
        return made

    def wants_weights(self, attention: Any, arguments: Arguments) -> bool:
        """Return whether attention weights were requested, in the call or in the configuration; the same for all layers."""
        if self._asked is None:  # a configuration is slow to read
            asked = arguments.get("output_attentions")
            self._asked = bool(getattr(attention.config, "output_attentions", False) if asked is None else asked)
        return self._asked

    def notes_of(self, valid: Tensor | None) -> dict[Any, Tensor]:
        """Return the notes that the choices of all layers share about one mask of candidates, see ``Candidates``."""
        return self.shared(valid, dict, "notes")

    def final_rows(self, hidden: Tensor, *, restore: bool, gate: bool) -> Tensor:
        """Return the tower's output, in which unused slots hold zeros.

        Args:
            hidden: ``[B, K, D]`` after the last layer and its norm.
            restore: return the rows to their positions in ``[B, N, D]``; dropped positions hold zeros.
            gate: weigh the rows by the gates of masked training, if no reader of the tower does.
        """
        if not self.dropped:
            return hidden
        if self.gates is not None:
            if not gate:
                return hidden
            hidden = hidden * self._output_gates().unsqueeze(-1).to(hidden.dtype)
            if restore and self.positions is None:
                return hidden
        if restore and self.positions is None:
            return hidden if self.valid is None else torch.where(self.valid.unsqueeze(-1), hidden, 0.0)
        hidden = self.gather_chosen(hidden)
        if restore and self.positions is not None:
            return restore_rows(hidden, self.positions, self.valid, self.length)
        if (
            self.gates is not None and self.chosen is not None
        ):  # nothing was dropped: padding rows stay as the stock model makes them
            return hidden
        return hidden if self.valid is None else torch.where(self.valid.unsqueeze(-1), hidden, 0.0)

    def gather_chosen(self, hidden: Tensor) -> Tensor:
        """Gather, after masked execution, the rows that gathered execution would have: ``[B, N, D]`` to ``[B, K, D]``.

        Pooling then sees only the kept rows, in training as in evaluation.
        """
        kept = self.candidates
        if self.chosen is None or kept is None or self.bound is None:
            return hidden
        if self.bound >= hidden.shape[1] and self.gates is not None:  # in training, where any row may keep everything
            return hidden
        indices = mask_to_indices(kept, self.bound)
        self._steps.append(indices)
        self.valid = kept.gather(1, indices)
        self.gates = None if self.gates is None else self.gates.gather(1, indices)
        self.chosen = None
        return keep_rows(hidden, indices)

    def restore(self, hidden: Tensor) -> Tensor:
        """Scatter the rows ``[B, K, D]`` back to their positions in the tower's input, ``[B, N, D]``; dropped ones hold zeros."""
        positions: Any = self.positions
        kept = self.kept_positions(len(hidden), hidden.device)
        rows = restore_rows(hidden, positions, self.valid, self.length)
        if self.gates is not None:
            self.gates = self.gates.new_zeros(len(hidden), self.length).scatter(1, positions, self.gates)
        self.valid, self.chosen, self.packing = kept, None, None
        self._steps.clear()
        return rows

    def _output_gates(self) -> Tensor:
        gates: Any = self.gates
        if self.valid is not None and self.bound is not None and self.bound >= self.length:
            # nothing was dropped: padding rows stay as the stock model makes them
            return gates.masked_fill(~self.valid, 1.0)
        return gates

    def kept_positions(self, batch: int, device: torch.device) -> Tensor | None:
        """Return which positions of the tower's input are still computed, bool ``[B, N]``; None if all are."""
        kept, positions = self.candidates, self.positions
        if positions is None:
            return None if kept is None else kept.expand(batch, -1)
        kept = torch.ones_like(positions, dtype=torch.bool) if kept is None else kept
        return torch.zeros(batch, self.length, dtype=torch.bool, device=device).scatter(1, positions, kept)

    def kept_mask(self, batch: int, device: torch.device, restored: bool) -> Tensor | None:
        """Return which rows of the output a reader may read, bool ``[B, K or N]``; None if it may read all."""
        if not self.dropped:
            return None
        valid = self.valid
        if not restored or self.positions is None:
            return valid
        valid = torch.ones_like(self.positions, dtype=torch.bool) if valid is None else valid
        return torch.zeros(batch, self.length, dtype=torch.bool, device=device).scatter(1, self.positions, valid)


def unused_first(indices: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move the unused slots of int64 ``[B, K]`` to the front, like the padding before a prompt.

    The rows that are generated next then follow the prompt's last row, and a sliding cache forgets unused slots first.
    """
    if valid is None:
        return indices, None
    order = valid.int().argsort(dim=-1, stable=True)
    return indices.gather(1, order), valid.gather(1, order)
