"""See the selections of a model, or give them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HardAttentionError, unknown
from .selection import Selection
from .selector import Selector


def selectors(model: nn.Module) -> dict[str, Selector]:
    """The selectors of a model by site name (the active copies, where PEFT keeps several)."""
    found: dict[str, Selector] = {}
    for module in model.modules():
        if isinstance(module, Selector):
            found[module.site] = module  # PEFT's copies come after the original
    return found


class Recording(list[Selection]):
    """Selections in the order they were made; ``recording["vision.inputs"]`` gives one site's."""

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = [selection for selection in self if selection.site == key]
        if not found:
            raise unknown("recorded site", key, self.sites)
        return found

    @property
    def sites(self) -> list[str]:
        """Sites in the order of their first selection."""
        return list(dict.fromkeys(selection.site for selection in self))


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record every selection that ``model`` makes inside the block, in forward and in generate().

    Example:
        >>> with record(model) as selections: model(**batch)        # doctest: +SKIP
        >>> selections["vision.inputs"][0].indices                   # doctest: +SKIP
    """
    recording = Recording()

    def note(module: nn.Module, args: Any, selection: Selection) -> None:
        if torch._C._current_graph_task_id() == -1:  # a recomputation inside backward is no new choice
            recording.append(selection)

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Selector)]
    if not handles:
        raise HardAttentionError(
            f"{type(model).__name__} has no hard-attention sites to record; load it with hard_attention=... or call apply()."
        )
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay(model: nn.Module, selections: Iterable[Selection] | Mapping[str, Tensor]) -> Iterator[None]:
    """Make ``model`` keep given positions inside the block.

    Args:
        selections: a recording of the same calls, replayed in order at each site; or site name to bool mask ``[B, N]`` (or
            ``[B, H, Q, N]``), used at every call. Sites not named choose for themselves.
    """
    masks: dict[str, list[Tensor]] = {}
    queues: dict[str, Iterator[Tensor]] = {}
    if isinstance(selections, Mapping):
        for site, mask in selections.items():
            masks[site] = [mask[:, None, None, :] if mask.dim() == 2 else mask]
            queues[site] = itertools.repeat(masks[site][0])
    else:
        for selection in selections:
            masks.setdefault(selection.site, []).append(selection.mask)
        queues = {site: iter(made) for site, made in masks.items()}
    known = selectors(model)
    for site in queues:
        if site not in known:
            raise unknown("site", site, known, type(model).__name__)

    def force(module: Selector, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        try:
            return args, {**kwargs, "forced": next(queues[module.site])}
        except StopIteration:
            raise HardAttentionError(
                f"the recording holds fewer selections at '{module.site}' than the replayed calls make."
            ) from None

    forced = [m for m in model.modules() if isinstance(m, Selector) and m.site in queues]
    before = [m.replayed for m in forced]
    handles = [m.register_forward_pre_hook(force, with_kwargs=True) for m in forced]
    for selector in forced:
        selector.replayed = max(int(mask.sum(-1).max()) for mask in masks[selector.site])
    try:
        yield
    finally:
        for selector, replayed in zip(forced, before, strict=True):
            selector.replayed = replayed
        for handle in handles:
            handle.remove()
