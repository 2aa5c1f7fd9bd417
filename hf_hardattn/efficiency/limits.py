"""The limit of a saving: no part of a model gets faster than its work gets smaller (Amdahl)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..devices import default_device
from ..errors import HardAttentionError
from .memory import peak_of
from .timing import interleaved_seconds

# operators that compute, by part; every other operator is "other"
OPERATORS = {
    "linear": ("addmm", "mm", "mkldnn_linear", "_mkl_linear", "_linear_pointwise", "linear"),
    "attention": (
        "bmm",
        "baddbmm",
        "_softmax",
        "_scaled_dot_product",
        "_flash_attention",
        "_efficient_attention",
        "_cudnn_attention",
    ),
    "convolution": ("convolution", "mkldnn_convolution", "cudnn_convolution", "thnn_conv2d", "_slow_conv2d"),
}


@dataclass
class Profile:
    """One call, profiled.

    Attributes:
        shares: of its time by part (``linear``, ``attention``, ``convolution``, ``other``), together 1.
        peak_bytes: most that PyTorch's allocator held at once for it, beyond what was there before.
        output: of the call.
    """

    shares: dict[str, float]
    peak_bytes: int
    output: Any


def profile_call(call: Callable[[], object]) -> Profile:
    """Run ``call`` once under the profiler."""
    gpu = default_device().type == "cuda"
    before = 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile writes lines of its own into the output
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, profile_memory=not gpu) as profiler:
        output = call()
    seconds = dict.fromkeys((*OPERATORS, "other"), 0.0)
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel by itself: its time stands at the operator that launched it, too
        name = event.key.rpartition("::")[2]  # aten's, or mkl's and mkldnn's where weights are packed
        part = next((part for part, names in OPERATORS.items() if name.startswith(names)), "other")
        seconds[part] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(seconds.values())
    peak = torch.cuda.max_memory_allocated() - before if gpu else peak_of(profiler)
    return Profile({part: value / total for part, value in seconds.items()}, peak, output)


def streaming_rows(dtype: torch.dtype, size: int = 4096, copies: int = 8, many: int = 64) -> float:
    """Rows at which a product with weights takes as long on this machine as reading them: with fewer (decoding), fewer FLOPs are no saving.

    Args:
        size: a side of the weights. copies: of them, read in turn, together more than any cache holds.
    """
    place: dict[str, Any] = dict(device=default_device(), dtype=dtype)
    weights = [torch.ones(size, size, **place) for _ in range(copies)]
    one, rows = torch.ones(1, size, **place), torch.ones(many, size, **place)

    def read() -> None:
        for weight in weights:
            nn.functional.linear(one, weight)

    with torch.inference_mode():
        calls = {"read": read, "compute": lambda: nn.functional.linear(rows, weights[0])}
        timed = interleaved_seconds(calls, rounds=5, warmup=1)
    reading, computing = (statistics.median(timed[name]) for name in ("read", "compute"))
    return max(1.0, reading / copies / (computing / many))


def amdahl(shares: Mapping[str, float], before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The largest speed-up that less work allows: ``1 / sum_p share_p * after_p / before_p``.

    Args:
        shares: of the baseline's time, by part. before, after: work of the baseline and of the variant, by part (see ``counting.work``); where
            it tells ``streamed``, that stands for ``linear``.
    """
    before, after = ({**work, "linear": work.get("streamed", work.get("linear", 0))} for work in (before, after))
    remaining = sum(share * (after[part] / before[part] if before[part] else 1.0) for part, share in shares.items())
    if remaining <= 0:
        raise HardAttentionError(f"the parts' shares of the time are {dict(shares)}; no limit follows from them.")
    return 1 / remaining


def between(whole: float, floor: float, keep: float) -> float:
    """The largest speed-up of keeping the share ``keep`` where time falls evenly from ``whole`` (everything kept) to ``floor`` (next to nothing)."""
    return whole / (floor + keep * (whole - floor))
