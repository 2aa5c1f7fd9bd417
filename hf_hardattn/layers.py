"""The layers of a tower: they carry the stream, and what earlier layers chose, from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .kept import Kept, product
from .resolution import Embedded
from .stream import Made, Pass, Stream, mask_rows

PASS = "hard_attention_pass"  # keyword that carries the Pass from the model's hook to the towers


@dataclass
class TowerState:
    """What one iteration over a tower's layers carries from layer to layer.

    Attributes:
        kept: site to the keys it left, for the layers that share its choice.
    """

    stream: Stream
    record: Pass | None = None
    length: int = 0
    source: Any = None
    kept: dict[str, Kept] = field(default_factory=dict)


class Turn:
    """A layer as its tower's loop sees it: called, it also carries the stream; in all else it is the layer."""

    def __init__(self, layers: HardLayers, layer: nn.Module, state: TowerState, index: int):
        self._layers, self._layer, self._state, self._index = layers, layer, state, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self._state
        if self._index == 0:
            state.record = kwargs.get(PASS)
        kwargs.pop(PASS, None)
        return self._layers.run(self._layer, state, self._index, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class HardLayers(nn.ModuleList):
    """A tower's list of layers. Iterating over it starts one pass: the stream lives in the iteration, not on the model.

    Transformers' own forward loop runs unchanged; each architecture says in ``run`` how its layers take their arguments.

    Attributes:
        tower: its name. restore: whether the output takes its full length again. source: tower that cross-attention reads.
        source_slots: maps which rows of ``source`` survived, bool ``[B, N]``, to the bound of their number; None when it drops none.
        followed: sites of this tower whose choice later layers share.
    """

    tower: str
    restore: bool
    source: str | None
    source_slots: Callable[[Tensor], int] | None
    followed: frozenset[str]

    def __iter__(self) -> Iterator[Any]:
        state = TowerState(Stream())
        for index, layer in enumerate(super().__iter__()):
            yield Turn(self, layer, state, index)

    def run(self, layer: nn.Module, state: TowerState, index: int, *args: Any, **kwargs: Any) -> Any:
        """Call ``layer`` with the stream's arguments, take the stream it returns, and finish after the last layer."""
        raise NotImplementedError

    def begin(self, state: TowerState, hidden: Any, mask: Tensor | None = None) -> Tensor:
        """The rows that a tower without padding starts with: as its embeddings made them, or what they chose to make.

        Args:
            hidden: ``[B, N, D]`` or ``Embedded``. mask: attention mask that the caller gave.
        """
        if not isinstance(hidden, Embedded):
            state.length = hidden.shape[1]
            state.stream = Stream(valid=mask_rows(mask, hidden.shape[0]))
            return hidden
        hidden.refuse(mask)
        state.length = hidden.length
        self.take(state, hidden.stream, hidden.made)
        return hidden.rows

    def plain(self, state: TowerState, layer: Any, attention: Any) -> bool:
        """Whether a layer has only to compute on the rows it gets, as the stock one does: no site of it chooses, nothing is weighed or packed.
        A GPU would wait for the rest of the bookkeeping."""
        chooses = any(s is not None and s.enabled for s in (layer.input_selector, layer.selector))
        chooses = chooses or attention.active_selector() is not None
        return not chooses and attention.follows is None and state.stream.gates is None and state.stream.packing is None

    def take(self, state: TowerState, stream: Stream, selections: Made) -> None:
        """Note what a layer selected."""
        state.stream = stream
        for selection in selections:
            if selection.site in self.followed:
                state.kept[selection.site] = Kept.of(selection, selections.columns)
        if state.record is not None:
            state.record.selections.extend(selections)

    def key_gates(self, state: TowerState, attention: Any, gates: Tensor | None) -> Tensor | None:
        """Gates of the keys of an attention, where it shares a choice made masked: that choice's times ``gates`` ``[B, N]``."""
        kept = state.kept.get(attention.follows)
        return gates if kept is None else product(kept.gates, gates)

    def source_gates(self, state: TowerState) -> Tensor | None:
        """Gates of the rows that cross-attention reads, ``[B, N]``, in masked training; else None."""
        return None if state.record is None or self.source is None else state.record.gates.get(self.source)

    def finish(self, state: TowerState, hidden: Tensor) -> Tensor:
        """The tower's output."""
        gates, record = state.stream.gates, state.record
        shared = record is not None and record.shares_gates
        if gates is not None and record is not None:
            record.gates[self.tower] = gates
        return state.stream.finish(hidden, state.length, self.restore, keep_gated=shared)


class HardLayerNorm(nn.LayerNorm):
    """LayerNorm that leaves all-zero rows zero: they mean that nothing was computed there, and must go on meaning it."""

    def forward(self, input: Tensor) -> Tensor:
        empty = (input == 0).all(-1, keepdim=True)
        # without variance the backward divides by sqrt(eps), which fp16 cannot hold: norm a ramp there instead
        ramp = torch.linspace(-1.0, 1.0, input.shape[-1], dtype=input.dtype, device=input.device)
        return super().forward(torch.where(empty, ramp, input)).masked_fill(empty, 0.0)
