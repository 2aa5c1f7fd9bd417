"""Cost of the selection itself: scorer, top-k and gather of one ``tokens`` site, compared with a layer of the stock model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..devices import wait_for_device
from ..functional.attention import keep_rows
from ..modeling.context import ForwardContext
from ..modeling.rows import select_rows
from ..modeling.state import TowerState
from ..models import family_of
from ..recording import selectors
from .timing import interleaved_seconds, ratios
from .workloads import Workload


def selection_overhead(
    model: nn.Module, stock: nn.Module, inputs: dict[str, Any], workload: Workload
) -> dict[str, float] | None:
    """Time the first ``tokens`` site of ``model`` on its hidden states, and the stock layer that it follows, in turn.

    Returns:
        Seconds of ``selection`` and ``layer``, and ``share``, the median of their ratio; None if there is no such site or layers are called
        through ``generate()``.
    """
    site = next((site for site in selectors(model) if ".tokens." in site), None)
    plain = family_of(stock)
    if site is None or plain is None or workload.generates:
        return None
    tower, _, layer = site.split(".")
    host = _host(model, site)
    block = plain.towers(stock)[tower].layers[int(layer)]
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)

    with torch.inference_mode():
        handle = block.register_forward_pre_hook(note, with_kwargs=True)
        stock(**inputs)
        handle.remove()
        hidden = seen["args"][0]
        calls = {
            "layer": lambda: block(*seen["args"], **seen["kwargs"]),
            "selection": lambda: _select(model, host, hidden),
        }
        timed = interleaved_seconds(calls, rounds=9, warmup=2, seconds=20.0)
    share = sorted(1 / ratio for ratio in ratios(timed, "layer")["selection"])
    median = {name: sorted(times)[len(times) // 2] for name, times in timed.items()}
    return {**median, "share": share[len(share) // 2]}


def _host(model: nn.Module, site: str) -> tuple[nn.Module, Any]:
    """Return the layer that hosts a ``tokens`` site, and its tower."""
    family: Any = family_of(model)
    name, kind, layer = site.split(".")
    tower = family.towers(model)[name]
    return tower.host(kind, int(layer))[0], tower


def _select(model: nn.Module, host: tuple[nn.Module, Any], hidden: torch.Tensor) -> torch.Tensor:
    layer, tower = host
    protected = tower.protected
    indices = select_rows(ForwardContext(model), TowerState(), layer, "selector", protected, hidden, hidden, None)
    return hidden if indices is None else keep_rows(hidden, indices)


@contextmanager
def later_layers(model: nn.Module) -> Iterator[list[float]]:
    """Collect for each call inside the block the seconds that ``model`` spends in the layers after the first one of its first tower, the
    part that a selection before them makes cheaper. Empty if there is no such tower."""
    found: list[float] = []
    family = family_of(model)
    if family is None:
        yield found
        return
    layers = next(iter(family.towers(model).values())).layers
    started = 0.0

    def start(*_: Any) -> None:
        nonlocal started
        wait_for_device()
        started = time.perf_counter()

    def stop(*_: Any) -> None:
        wait_for_device()
        found.append(time.perf_counter() - started)

    handles = [
        layers[0].register_forward_hook(start),
        layers[-1].register_forward_hook(stop),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
