"""Scorers: hidden states to scores, higher = keep. Each has its own file, whose name is the registered name.

A scorer works in two steps, so that decoding with a cache gives the same result as decoding without one: ``keys`` maps each
position by itself to features (cached with the attention's keys), and ``score`` turns the features, and the queries if the
scorer uses them, into scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..options import Configurable


@dataclass
class Projections:
    """The projections of the host attention, for scorers that use them.

    Attributes:
        query: maps states ``[B, Q, D]`` to queries ``[B, H, Q, d]``, scaled so that ``query @ key`` is the attention logit.
        key: maps states ``[B, N, D]`` to keys ``[B, H, N, d]``.
        valid: bool ``[B, N]``, the valid positions; None if all are valid.
        grid: number of patches down and across the image, for scorers that read a grid; None if it is not known.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    valid: Tensor | None = None
    grid: tuple[int, int] | None = None


class Scorer(Configurable, nn.Module):
    """Base class, built as ``Scorer(hidden_size=D, query_size=Dq, heads=H, **scorer_options)``; H is 1 if heads share a choice.

    Class attributes:
        per_query: each query has its own choice (``score`` gets ``queries``).
        needs_cls: reads a CLS token at position 0 of the same tower.
        needs_grid: reads a whole grid of patches after a CLS token (``vision.inputs`` only).
        needs_pixels: reads the image, before any patch is embedded (``vision.inputs`` only). Its states are the pixels, averaged to
            ``cells`` x ``cells`` numbers per patch and channel, ``[B, C, rows * cells, columns * cells]``, and D is C.
        needs_projections: reads the projections of the host attention.
        needs_positions: ``keys`` reads ``positions``; if False, they are not computed.
        draws: in training, the features are noise from ``draw``.
        reads_logits: ``score`` gets the attention's logits ``[B, heads of the attention, Q, N]`` instead of features; ``keys`` is not
            called.
        sequential: selects in several glimpses (a ``Sequential``).
        monotonic: no glimpse or query selects a position before those of the previous one. With ``per_query``, the last feature
            marks (1) the positions that were passed in earlier decoding steps.
        features: F, number of features per position and head.
        prefix: number of rows before the patches (CLS, registers), for scorers that read a grid or pixels; set for the tower.
    """

    kind = "scorer"
    built_with = ("hidden_size", "query_size", "heads")
    per_query: ClassVar[bool] = False
    needs_cls: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    needs_pixels: ClassVar[bool] = False
    needs_projections: ClassVar[bool] = False
    needs_positions: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    monotonic: bool = False
    features: int = 1
    cells: int = 1
    prefix: int = 1

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1):
        super().__init__()
        self.hidden_size, self.query_size, self.heads = hidden_size, query_size, heads

    def forward(self, method: str, *args: Any) -> Tensor:
        """Call ``keys``, ``score`` or another method by name.

        Calling the module runs its hooks (for offloaded weights, sharding, quantisation) before the weights are read.
        """
        return getattr(self, method)(*args)

    def reset_parameters(self) -> None:
        """Initialise the parameters with ``torch.nn.init`` (Transformers guards it against overwriting loaded weights)."""

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        """Map each position by itself to features.

        Args:
            states: ``[B, N, D]``.
            positions: int64 ``[B, N]``, place of each position in its row, not counting padding; None unless ``needs_positions``.
            projections: projections of the host attention, if ``needs_projections``.

        Returns:
            fp32 ``[B, H, N, F]``.
        """
        raise NotImplementedError

    def draw(self, states: Tensor) -> Tensor:
        """Return random features for ``states`` ``[B, N, D]``, fp32 ``[B, H, N, F]``; used in training if the scorer ``draws``."""
        raise NotImplementedError

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        """Turn features into scores, fp32 ``[B, H, Q, N]`` with Q = 1 unless ``per_query``; ``queries`` is ``[B, Q, Dq]``."""
        return features[..., 0].unsqueeze(2)


class Sequential(Scorer):
    """A scorer that selects in several glimpses; ``glimpses.look`` calls it for the scores of each glimpse.

    Attributes:
        glimpses: T, the largest number of glimpses.
        halting_cost: cost of a full set of glimpses in the training loss, if the scorer learns to stop; None: it never stops early.
    """

    sequential = True
    glimpses: int
    halting_cost: float | None = None

    @property
    def halts(self) -> bool:
        """Whether the scorer may stop before its budget is used up."""
        return self.halting_cost is not None

    def start(self, features: Tensor) -> Tensor:
        """Return the state before the first glimpse, fp32 ``[B, H, d]``; ``features`` is ``[B, H, N, F]``."""
        raise NotImplementedError

    def look(self, features: Tensor, state: Tensor) -> Tensor:
        """Return the scores of this glimpse, fp32 ``[B, H, 1, N]``."""
        raise NotImplementedError

    def see(self, state: Tensor, seen: Tensor) -> Tensor:
        """Return the state after a glimpse; ``seen`` fp32 ``[B, H, F]`` is the mean of the features that it kept (0 if it kept none)."""
        raise NotImplementedError

    def go_on(self, state: Tensor) -> Tensor:
        """Return the logit for taking another glimpse, fp32 ``[B, H, 1]``; only called if the scorer ``halts``."""
        raise NotImplementedError

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        return self.look(features, self.start(features))
