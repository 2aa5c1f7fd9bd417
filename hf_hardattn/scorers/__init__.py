"""Scorers: hidden states to scores, higher = keep. One file each; the file name is the registered name.

A scorer works in two steps, so that decoding with a cache gives what decoding without one gives: ``keys`` maps each
position alone to features (cached beside the attention's keys), ``score`` turns features, and the queries where the
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
    """The host attention's own projections, for scorers that look through them.

    Attributes:
        query: states ``[B, Q, D]`` to queries ``[B, H, Q, d]``, scaled so that ``query @ key`` is the attention logit.
        key: states ``[B, N, D]`` to keys ``[B, H, N, d]``.
        valid: bool ``[B, N]``, the positions that are there; None when all are.
        grid: patches down and across of the image, for scorers that read a grid; None when it is not known.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    valid: Tensor | None = None
    grid: tuple[int, int] | None = None


class Scorer(Configurable, nn.Module):
    """A scorer. Built as ``Scorer(hidden_size=D, query_size=Dq, heads=H, **scorer_options)``; H is 1 when heads share a choice.

    Class attributes:
        per_query: each query chooses for itself (``score`` gets ``queries``).
        needs_cls: reads a CLS token at position 0 of the same tower.
        needs_grid: reads a whole grid of patches behind a CLS token (``vision.inputs`` only).
        needs_pixels: reads the image, before any patch is embedded (``vision.inputs`` only): its states are the pixels, averaged to
            ``cells`` x ``cells`` numbers a patch and channel, ``[B, C, rows * cells, columns * cells]``, and D is C.
        needs_projections: reads the attention's own projections.
        needs_positions: ``keys`` reads ``positions``; False saves making them.
        draws: in training its features are noise, from ``draw``.
        reads_logits: ``score`` gets the attention's logits ``[B, heads of the attention, Q, N]`` in place of features; ``keys`` is not asked.
        sequential: selects in several glimpses (a ``Sequential``).
        monotonic: no glimpse or query selects a position in front of those before it. With ``per_query`` the last feature tells
            which positions were passed (1) in earlier steps of decoding.
        features: F, number of features per position and head.
        prefix: rows in front of the patches (CLS, registers), for scorers that read a grid or pixels; set for the tower.
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

        Whatever hangs on a module's call (offloaded weights, sharding, quantisation) is then done before the weights are read.
        """
        return getattr(self, method)(*args)

    def reset_parameters(self) -> None:
        """Initialise the parameters with ``torch.nn.init`` (Transformers guards it against overwriting loaded weights)."""

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        """Map each position alone to features.

        Args:
            states: ``[B, N, D]``.
            positions: int64 ``[B, N]``, place of each position in its row, padding not counted; None unless ``needs_positions``.
            projections: the host attention's, when ``needs_projections``.

        Returns:
            fp32 ``[B, H, N, F]``.
        """
        raise NotImplementedError

    def draw(self, states: Tensor) -> Tensor:
        """Random features for positions ``[B, N, D]``, fp32 ``[B, H, N, F]``; used in training when the scorer ``draws``."""
        raise NotImplementedError

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        """Turn features into scores, fp32 ``[B, H, Q, N]`` with Q = 1 unless ``per_query``; ``queries`` is ``[B, Q, Dq]``."""
        return features[..., 0].unsqueeze(2)


class Sequential(Scorer):
    """A scorer that selects in several glimpses: ``glimpses.look`` asks it for the scores of each.

    Attributes:
        glimpses: T, the largest number of glimpses.
        halting_cost: what a full set of glimpses costs in the training loss when the scorer learns to stop; None: it never stops early.
    """

    sequential = True
    glimpses: int
    halting_cost: float | None = None

    @property
    def halts(self) -> bool:
        """Whether it may stop before its budget is spent."""
        return self.halting_cost is not None

    def start(self, features: Tensor) -> Tensor:
        """The state before the first glimpse, fp32 ``[B, H, d]``; ``features`` is ``[B, H, N, F]``."""
        raise NotImplementedError

    def look(self, features: Tensor, state: Tensor) -> Tensor:
        """Scores of this glimpse, fp32 ``[B, H, 1, N]``."""
        raise NotImplementedError

    def see(self, state: Tensor, seen: Tensor) -> Tensor:
        """The state after a glimpse; ``seen`` fp32 ``[B, H, F]`` is the mean of the features it kept (0 when it kept none)."""
        raise NotImplementedError

    def go_on(self, state: Tensor) -> Tensor:
        """Logit of another glimpse, fp32 ``[B, H, 1]``, where it ``halts``."""
        raise NotImplementedError

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        return self.look(features, self.start(features))
