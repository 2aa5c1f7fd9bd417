"""Cost in bytes: measured peaks of one call, and the counted activations that a training step keeps for its backward pass."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import default_device

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(profiler: Any) -> int:
    """Return the peak of the CPU allocator in bytes beyond the memory held before, from a profile with ``profile_memory=True``."""
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident_bytes(call: Callable[[], object]) -> int | None:
    """Return the increase of the process's resident memory to its high-water mark in ``call``; None if the system does not report it
    (not Linux), or if it is meaningless (the model is on a GPU).

    Freed pages are returned first, and the mark is reset, so that a later call in the same process is measured like the first.
    """
    if default_device().type == "cuda":
        call()
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _high_water()
        call()
        return _high_water() - before
    except (OSError, AttributeError):
        return None


def _high_water() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def activation_bytes(model: nn.Module, batch: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None) -> int:
    """Return the bytes that one training step of ``model`` keeps between its forward and its backward pass, without the weights. They
    are counted, not measured: every storage that autograd saves counts once.

    Args:
        loss: computes the loss from the output; ``output.loss`` by default.
    """
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *_tensors(batch))}
    saved: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # keep it alive, because another tensor could reuse its memory
        return tensor

    training = model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(**batch)
            (loss(output) if loss is not None else output.loss)
    finally:
        model.train(training)
    return sum(saved.values())


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]
