"""The limit of a saving: the time of a part cannot decrease more than its work (Amdahl)."""

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

# operators that compute, by part; all others belong to "other"
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
    """Profile of one call.

    Attributes:
        shares: shares of the time by part (``linear``, ``attention``, ``convolution``, ``other``), which sum to 1.
        peak_bytes: peak of PyTorch's allocator during the call, beyond the memory held before.
        output: output of the call.
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise each profile prints log lines
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, profile_memory=not gpu) as profiler:
        output = call()
    seconds = dict.fromkeys((*OPERATORS, "other"), 0.0)
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is also attributed to the operator that launched it
        name = event.key.rpartition("::")[2]  # operators of aten, or of mkl and mkldnn if weights are packed
        part = next((part for part, names in OPERATORS.items() if name.startswith(names)), "other")
        seconds[part] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(seconds.values())
    peak = torch.cuda.max_memory_allocated() - before if gpu else peak_of(profiler)
    return Profile({part: value / total for part, value in seconds.items()}, peak, output)


def streaming_rows(dtype: torch.dtype, size: int = 4096, copies: int = 8, many: int = 64) -> float:
    """Number of rows at which a product with weights takes as long on this machine as reading the weights. With fewer rows (decoding),
    fewer FLOPs save nothing.

    Args:
        size: side of the weight matrices. copies: number of them, read in turn; together they exceed any cache.
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
    """Return the largest speed-up that the smaller work allows: ``1 / sum_p share_p * after_p / before_p``.

    Args:
        shares: shares of the reference's time, by part. before, after: work of the reference and of the variant, by part (see
            ``counting.work``); ``streamed`` replaces ``linear`` if it is present.
    """
    before, after = ({**work, "linear": work.get("streamed", work.get("linear", 0))} for work in (before, after))
    remaining = sum(share * (after[part] / before[part] if before[part] else 1.0) for part, share in shares.items())
    if remaining <= 0:
        raise HardAttentionError(
            f"the parts' shares of the time are {dict(shares)}; no limit can be computed from them."
        )
    return 1 / remaining


def between(whole: float, floor: float, keep: float) -> float:
    """Largest speed-up of keeping the share ``keep`` if time falls linearly from ``whole`` (all kept) to ``floor`` (almost none kept)."""
    return whole / (floor + keep * (whole - floor))
