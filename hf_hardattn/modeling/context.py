"""The state of one call of a model, and the modes that a thread has switched on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .cross import Source
    from .selection import Selection
    from .selector import Selector
    from .state import TowerState

CONTEXT = "hard_attention_context"  # keyword that carries a ForwardContext from the model to its layers
MODEL = "hard_attention_model"  # a mark on every module of a hard model, the same on all; no other model has it


class Settings(NamedTuple):
    """The settings of one selector in one call.

    Attributes:
        soft: the selector selects nothing.
        drawing: the choice is drawn, as in training; False takes the best one.
        final: schedules have their final values.
        execution: ``"masked"`` or ``"gathered"``, or None to follow the configuration.
        forced: bool ``[B, H, Q, N]``, positions to keep instead of choosing; None to choose.
        recorders: recorders of the selection, each with its name for the site.
    """

    soft: bool = False
    drawing: bool = False
    final: bool = False
    execution: str | None = None
    forced: Tensor | None = None
    recorders: tuple[tuple[Any, str], ...] = ()


class Mode:
    """The mode that one context manager sets for the selectors of one model, in one thread.

    Args:
        sites: site of each of the model's selectors, by the selector's id.
        soft, sampled: see ``hf_hardattn.soft`` and ``hf_hardattn.sampled``.
        execution: see ``hf_hardattn.execution``.
        assisted: a call that reads a prompt reads the draft of assisted decoding as well.
        recorder: receives every selection.
        replayed: dict from site to the masks that its calls keep, in order.
    """

    def __init__(
        self,
        sites: Mapping[int, str],
        *,
        soft: bool = False,
        sampled: bool = False,
        assisted: bool = False,
        execution: str | None = None,
        recorder: Any = None,
        replayed: dict[str, Iterator[Tensor]] | None = None,
    ):
        self.sites = sites
        self.soft, self.sampled, self.assisted, self.execution = soft, sampled, assisted, execution
        self.recorder, self.replayed = recorder, replayed or {}


_EVALUATING, _TRAINING = Settings(), Settings(drawing=True)

_MODES: ContextVar[tuple[Mode, ...]] = ContextVar("hard_attention_modes", default=())
_CURRENT: ContextVar[Any] = ContextVar("hard_attention_current", default=None)
_traced: Any = None  # the same for Dynamo, which cannot trace a ContextVar; None again when the call ends

# Compiled code cannot see a thread's modes, so models run eagerly while any thread has one. The stance is process-wide, so its users
# are counted: blocks of different threads may overlap.
_stance_lock = threading.Lock()
_eager_blocks = 0
_eager_stance: Any = None


@contextmanager
def active(mode: Mode) -> Iterator[None]:
    """Switch a mode on for this thread. Blocks may overlap in any order: each removes only its own mode."""
    _MODES.set((*_MODES.get(), mode))
    _enter_eager()
    try:
        yield
    finally:
        _leave_eager()
        _MODES.set(tuple(other for other in _MODES.get() if other is not mode))


@contextmanager
def without_modes() -> Iterator[None]:
    """Switch off, inside the block, every mode that this thread has switched on around it."""
    before = _MODES.get()
    _MODES.set(())
    try:
        yield
    finally:
        _MODES.set(before)


def _enter_eager() -> None:
    global _eager_blocks, _eager_stance
    with _stance_lock:
        _eager_blocks += 1
        # without Dynamo nothing is compiled, and importing it takes seconds
        if _eager_stance is None and "torch._dynamo" in sys.modules:
            _eager_stance = torch.compiler.set_stance("force_eager")
            _eager_stance.__enter__()


def _leave_eager() -> None:
    global _eager_blocks, _eager_stance
    with _stance_lock:
        _eager_blocks -= 1
        if _eager_blocks == 0 and _eager_stance is not None:
            _eager_stance.__exit__(None, None, None)
            _eager_stance = None


class ForwardContext:
    """State that the towers of a model share during one call.

    It is deliberately a plain class, because FSDP copies dataclasses that it finds among the arguments.

    Attributes:
        owner: module whose call opened the context.
        holder: module that entered the context and has not left it, or None. outer: the context that was current before.
        modes: the thread's modes at that time.
        towers: dict from tower name to the state of its rows.
        selections: every selection of the call, in order.
        labels: labels that the model was called with, or None.
        ids: tokens that the model was called with, int64 ``[B, N]``, if a decoder's sites choose among those of an image; None otherwise.
        predictions: number of last rows whose logits the caller requested; 0 if not specified.
        target: states of the labels ``[B, T, D]``, for estimators that read the answer; None otherwise.
        classes: classes of the examples, int64 ``[B]``, for estimators that learn from them; None otherwise.
        source_given: the caller passed encoder states that were computed before.
        kept_source: what is known of their rows; None if nothing is.
        copies_input: the model's head feeds the encoder's input to its decoder as well.
        as_tuple: the caller requested a tuple.
        finished: the call is over; a layer that runs again is being recomputed in the backward pass.
        opened: the hook of a whole model has filled it; one that a tower makes when it is called on its own stays empty.
        terms: the terms that the estimators added to the task loss; None if they added nothing.
        selectors: the model's selectors by site, in a training call; empty in others. Finding them takes a walk through all modules, so
            it is done once per step.
        call: what a recording knows this call by; None until a selection is recorded. Recordings outlive the context and do not hold it.
    """

    def __init__(self, owner: nn.Module):
        compiling = torch.compiler.is_compiling()
        self.owner = owner
        self.holder: nn.Module | None = None
        self.outer: ForwardContext | None = None
        # ContextVar cannot be traced; modes force eager execution, so compiled code never needs them
        self.modes: tuple[Mode, ...] = () if compiling else _MODES.get()
        self.towers: dict[str, TowerState] = {}
        self.selections: list[Selection] = []
        self.labels: Tensor | None = None
        self.ids: Tensor | None = None
        self.predictions = 0
        self.target: Tensor | None = None
        self.classes: Tensor | None = None
        self.source_given = False
        self.kept_source: Source | None = None
        self.copies_input = False
        self.as_tuple = False
        self.finished = False
        self.opened = False
        self.terms: Tensor | None = None
        self.selectors: dict[str, Selector] = {}
        self.call: object | None = None

    def enter(self, holder: nn.Module) -> None:
        """Make this the current context until ``holder`` leaves it; no effect if it is entered already."""
        if self.holder is None:
            self.holder, self.outer = holder, _current()
            _set_current(self)

    def leave(self, holder: nn.Module) -> None:
        """Make the context before this one current again; no effect if ``holder`` did not enter this one."""
        if self.holder is holder:
            _set_current(self.outer)
            self.holder = self.outer = None

    def settings(self, selector: Selector) -> Settings:
        """Return the settings of ``selector`` in this call."""
        if not self.modes:
            return _TRAINING if selector.training else _EVALUATING
        modes = [(mode, mode.sites[id(selector)]) for mode in self.modes if id(selector) in mode.sites]
        sampled = any(mode.sampled for mode, _ in modes)
        executions = [mode.execution for mode, _ in modes if mode.execution is not None]
        replays = [mode.replayed[site] for mode, site in modes if site in mode.replayed]
        return Settings(
            soft=any(mode.soft for mode, _ in modes),
            drawing=selector.training or sampled,
            final=sampled,
            execution=executions[-1] if executions else None,
            forced=next(replays[-1]) if replays else None,
            recorders=tuple((mode.recorder, site) for mode, site in modes if mode.recorder is not None),
        )

    def runs_masked(self, selector: Selector) -> bool:
        """Return whether ``selector`` runs masked in this call, so that its choice weighs all candidates."""
        if not self.modes:
            return selector.masked
        modes = [mode for mode in self.modes if id(selector) in mode.sites]
        executions = [mode.execution for mode in modes if mode.execution is not None]
        drawing = selector.training or any(mode.sampled for mode in modes)
        return selector.runs_masked(Settings(drawing=drawing, execution=executions[-1] if executions else None))

    def is_soft(self, selector: Selector) -> bool:
        """Return whether ``selector`` is switched off in this call."""
        return bool(self.modes) and any(mode.soft and id(selector) in mode.sites for mode in self.modes)

    def add(self, selection: Selection, settings: Settings) -> None:
        """Record a selection. A recomputation in the backward pass adds no new one."""
        if self.finished:
            return
        self.selections.append(selection)
        if settings.recorders:
            selection.call = self.call = self.call or object()
        for recorder, site in settings.recorders:
            recorder.add(selection, site)


def context_around(module: nn.Module) -> ForwardContext | None:
    """Return the context of the enclosing call of the model that ``module`` belongs to, which may not have been passed down to it."""
    context = _current()
    if context is None or context.owner.__dict__.get(MODEL) is module.__dict__.get(MODEL):
        return context
    # a part that replaced another one has the mark of its own model, or of none that there is; the walk takes long, but is rare
    return context if module in context.owner.modules() else None


def _current() -> ForwardContext | None:
    if torch.compiler.is_compiling():
        return _traced
    context: ForwardContext | None = _CURRENT.get()
    # a KeyboardInterrupt ends a call without its hooks, so that nobody leaves its context
    while context is not None and not _is_running(context.holder):
        context = context.outer
        _CURRENT.set(context)
    return context


def _is_running(module: nn.Module | None) -> bool:
    """Return whether a method of ``module`` encloses this call."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_locals.get("self") is not module:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _set_current(context: ForwardContext | None) -> None:
    global _traced
    if torch.compiler.is_compiling():
        _traced = context
    else:
        _CURRENT.set(context)


def is_soft_now(selector: nn.Module) -> bool:
    """Return whether this thread runs ``selector`` soft."""
    return any(mode.soft and id(selector) in mode.sites for mode in _MODES.get())


def has_modes(context: ForwardContext | None) -> bool:
    """Return whether a mode is on: in the call's context, or in this thread if no call has begun."""
    if context is not None:
        return bool(context.modes)
    return not torch.compiler.is_compiling() and bool(_MODES.get())
