"""Sites that choose rows: ``inputs`` before a tower's first layer, ``tokens`` after a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..scorers import Projections
from .candidates import Candidates, Protected
from .context import ForwardContext
from .selection import Selection
from .selector import Selector, running
from .state import TowerState


def candidates_among(
    protected: Protected,
    valid: Tensor | None,
    states: Tensor,
    bound: int | None,
    always: Tensor | None = None,
    varied: bool = False,
    notes: dict[Any, Tensor] | None = None,
) -> Candidates:
    """Return the candidates ``[B, N]`` of a choice that applies to all queries of a row.

    Args:
        valid: bool ``[B, N]`` or None. states: ``[B, N, D]``. bound: upper bound of the valid ones in a row, or None.
        always: rows that are always kept, bool ``[B, N]``, in place of ``protected``; None if that describes them.
        varied: their number differs between the rows of the batch; otherwise ``protected`` gives it.
        notes: notes of ``valid``, see ``Candidates``.
    """
    if always is not None:
        valid = None if valid is None else valid[:, None, None]
        return Candidates(valid, always[:, None, None], Protected() if varied else protected, bound, varied)
    if valid is None:
        return Candidates(ends=protected)
    return Candidates(valid[:, None, None], None, protected, bound, notes={} if notes is None else notes)


def choose_among(
    context: ForwardContext,
    selector: Selector,
    states: Tensor,
    valid: Tensor | None,
    protected: Protected,
    bound: int | None = None,
    projections: Callable[[], Projections] | None = None,
    always: Tensor | None = None,
    varied: bool = False,
    grid: tuple[int, int] | None = None,
    notes: dict[Any, Tensor] | None = None,
) -> Selection | None:
    """Make one choice for each row of ``states`` ``[B, N, D]``; return None if the site is switched off or keeps everything.

    Args:
        valid: bool ``[B, N]`` or None. bound: upper bound of the valid positions in a row.
        projections: function that makes the projections of the host attention, for scorers that use them.
        always, varied, notes: see ``candidates_among``. grid: grid of the image, see ``Projections``.
    """
    settings = context.settings(selector)
    # keeping everything needs no scores, unless they are recorded or trained
    idle = selector.keeps_all and not settings.drawing and not settings.recorders
    if settings.soft or (idle and settings.forced is None):
        return None
    looks = None
    if projections is not None and (selector.scorer.needs_projections or selector.scorer.needs_grid):
        looks = replace(projections(), grid=grid)
    features = selector.keys(states, settings, valid, projections=looks)
    inputs = selector.training_inputs(states, valid, context, settings)
    candidates = candidates_among(protected, valid, states, bound, always, varied, notes)
    selection = selector(features, candidates, settings, inputs=inputs)
    context.add(selection, settings)
    return selection


def select_rows(
    context: ForwardContext,
    state: TowerState,
    host: nn.Module,
    name: str,
    protected: Protected,
    hidden: Tensor,
    states: Tensor,
    projections: Callable[[], Projections] | None,
) -> Tensor | None:
    """Choose among the remaining rows, and record what later layers need to know.

    Args:
        host, name: module and attribute of the selector.
        hidden: ``[B, N, D]``, the rows. states: what scorers read that use the attention's projections.

    Returns:
        The indices of the remaining rows, int64 ``[B, K]``; None if all stay where they are.
    """
    selector = running(getattr(host, name))
    read = states if selector.scorer.needs_projections else hidden
    selection = choose_among(
        context,
        selector,
        read,
        state.candidates,
        protected,
        state.bound,
        projections,
        state.always,
        state.varied,
        state.grid,
    )
    if selection is None:
        return None
    selection.positions = state.positions
    return state.apply(selection, hidden.shape[0], hidden.shape[1])
