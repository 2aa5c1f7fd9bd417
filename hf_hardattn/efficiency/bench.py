"""The benchmark: every hard row is compared with two references of the same run, stock and exact (this library at budget 1.0)."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from ..api import apply
from ..config import HardAttentionConfig
from ..devices import default_device, device_name, graphed
from ..modes import execution
from ..recording import selectors
from ..version import __version__
from . import allocator
from .checkpoints import take_trained_selectors
from .counting import work
from .joules import joules_per_call
from .limits import amdahl, between, profile_call, streaming_rows
from .memory import peak_resident_bytes
from .overhead import later_layers, selection_overhead
from .suites import Group
from .timing import interleaved_seconds, ratios
from .workloads import DTYPES, Workload, cache_bytes, share_weights

STOCK, EXACT = "stock", "exact"
UNCOMPILED = "stock, not compiled"
MODES = ("eager", "compiled", "cuda_graphs")
SECONDS_OF_ENERGY = 1.0  # at least: the counter of a GPU is updated about ten times per second


def run(
    groups: list[Group], *, rounds: int, seconds: float | None, layers_too: bool = False, mode: str = "eager"
) -> Iterator[dict[str, Any]]:
    """Measure groups one after the other; see ``measure``."""
    for group in tqdm(groups, "bench"):
        yield measure(group, rounds=rounds, seconds=seconds, layers_too=layers_too, mode=mode)


def measure(
    group: Group, *, rounds: int, seconds: float | None = None, layers_too: bool = False, mode: str = "eager"
) -> dict[str, Any]:
    """Measure one workload with its rows.

    In each round every model runs once. Every speed-up is the median over rounds of the reference's time divided by the row's.

    Args:
        rounds: maximum number of rounds. seconds: timing budget, after which no further round starts (at least two are run).
        layers_too: also time the layers after the first one separately.
        mode: how all calls are run, including the references. ``compiled``: see ``Workload.compiled``; uncompiled stock is added.
            ``cuda_graphs``: replayed without the host, for which a small model on a GPU otherwise waits.

    Returns:
        JSON: the workload, and for ``stock``, ``exact`` and every row its time, throughput, FLOPs (executed and nominal), peak memory,
        energy (None: not measured), cache, speed-ups with their quartiles, and the limit, which follows from the profile of the stock
        model, or lies between its time and that of the group's floor.
    """
    workload = group.workload
    models = models_of(group)
    stock = models[STOCK]
    inputs = workload.inputs(stock)
    if not group.stock:
        del models[STOCK]
    calls: dict[str, Any] = {name: partial(workload.call, model, inputs) for name, model in models.items()}
    if mode == "compiled":
        calls = {name: workload.compiled(model, inputs) for name, model in models.items()}
        if group.stock:
            calls[UNCOMPILED], models[UNCOMPILED] = partial(workload.call, stock, inputs), stock
    resident = {name: peak_resident_bytes(call) for name, call in calls.items()}  # also the first call, which warms up
    profiles = {name: profile_call(call) for name, call in calls.items()}
    if mode == "cuda_graphs" and not workload.generates:
        calls = {name: graphed(call) for name, call in calls.items()}
    with ExitStack() as stack:
        later = {name: stack.enter_context(later_layers(model)) for name, model in models.items()} if layers_too else {}
        timed = interleaved_seconds(calls, rounds=rounds, warmup=0, seconds=seconds)
    shares = profiles[STOCK].shares if group.stock else None
    to_stock, to_exact = ratios(timed, STOCK) if group.stock else None, ratios(timed, EXACT)
    least_rows = streaming_rows(DTYPES[workload.dtype])
    executed = {name: work_of(workload, model, inputs, least_rows) for name, model in models.items()}
    targets = {row.name: row.targets for row in group.rows}
    limits = limits_above_floor(group, {name: statistics.median(times) for name, times in timed.items()})
    entries = {}
    for name, model in models.items():
        nominal = executed[name]
        if any(
            selector.masked for selector in selectors(model).values()
        ):  # masked execution computes all positions, also dropped ones
            with execution(model, "gathered"):
                nominal = work_of(workload, model, inputs)
        median = statistics.median(timed[name])
        limit = limits.get(name, amdahl(shares, executed[STOCK], executed[name])) if shares is not None else None
        against_stock = spread(to_stock[name]) if to_stock is not None else None
        entries[name] = {
            "seconds": {"median": median, "quartiles": quartiles(timed[name]), "rounds": len(timed[name])},
            "throughput": workload.batch * max(1, workload.new_tokens if workload.model == "t5_decode" else 1) / median,
            "flops": {"executed": flops(executed[name]), "nominal": flops(nominal)},
            "against_stock": against_stock,
            "against_exact": spread(to_exact[name]),
            "limit": limit,
            "share_of_limit": against_stock["median"] / limit if against_stock and limit else None,
            "peak_bytes": profiles[name].peak_bytes,
            "peak_resident_bytes": resident[name],
            "joules": joules_per_call(calls[name], max(rounds, int(SECONDS_OF_ENERGY / median) + 1)),
            "targets": targets.get(name, {}),
        }
        if workload.generates:
            entries[name]["cross_cache_bytes"] = cache_bytes(profiles[name].output)
        if later.get(name):
            entries[name]["later_layers_seconds"] = statistics.median(later[name])
    for row in group.rows:
        if row.beside is not None:
            found, expected = (calls[name]()[0] for name in (row.name, row.beside))
            entries[row.name]["beside"] = {
                "row": row.beside,
                "speed": spread(ratios(timed, row.beside)[row.name]),
                "largest_difference": float((found - expected).abs().max()),
            }
    result = {
        "name": group.name,
        "workload": vars(workload),
        "time_shares": shares,
        "streaming_rows": least_rows,
        "rows": entries,
        "hard": {row.name: row.hard for row in group.rows},
        "measured_at": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "rounds_wanted": rounds,
    }
    overheads = {row.name: selection_overhead(models[row.name], stock, inputs, workload) for row in group.rows}
    result["selection_overhead"] = {name: value for name, value in overheads.items() if value is not None}
    return result


def models_of(group: Group) -> dict[str, nn.Module]:
    """Return stock, exact and the model of every row by name, with shared weights; a row ``beside`` another has its selectors."""
    stock = group.workload.build()
    first = HardAttentionConfig.parse(group.rows[0].hard)
    models = {STOCK: stock, EXACT: apply(share_weights(stock), _exact(first)).eval()}
    for row in group.rows:
        models[row.name] = apply(share_weights(stock), row.hard).eval()
        if row.trained:
            take_trained_selectors(models[row.name], group.workload.model)
        if row.beside is not None:  # the same scores, so that both select the same positions
            others = selectors(models[row.beside])
            for site, selector in selectors(models[row.name]).items():
                selector.load_state_dict(others[site].state_dict())
    return models


def _exact(config: HardAttentionConfig) -> HardAttentionConfig:
    """Return the configuration with the same sites, which keep everything."""
    whole = {"budget": 1.0}
    sites = {pattern: {**overrides, **whole} for pattern, overrides in (config.sites or {}).items()}
    return config.replace(sites=sites or None, **whole)


def work_of(workload: Workload, model: nn.Module, inputs: dict[str, Any], least_rows: float = 1.0) -> dict[str, Any]:
    """Return the work of one call by part, see ``counting.work``."""
    asks = any(selector.data_dependent or selector.config.pack for selector in selectors(model).values())
    asks = asks or workload.generates or "spatial_shapes" in inputs
    return work(partial(workload.run, model, inputs), fake=not asks, least_rows=least_rows)


def limits_above_floor(group: Group, seconds: dict[str, float]) -> dict[str, float]:
    """Return the limits of the rows by name, from the times of stock and of the group's floor; empty if the group has no floor."""
    floor = next((row.name for row in group.rows if row.floor), None)
    if floor is None or not group.stock:
        return {}
    budgets = {row.name: row.hard["budget"] for row in group.rows if row.name != floor}
    shares = {
        name: budget if isinstance(budget, float) else budget / group.workload.size for name, budget in budgets.items()
    }
    return {name: between(seconds[STOCK], seconds[floor], keep) for name, keep in shares.items()}


def flops(parts: dict[str, Any]) -> int:
    """Return the FLOPs of all matrix products in the result of ``work_of``."""
    return sum(parts[part] for part in ("linear", "attention", "convolution"))


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "quartiles": quartiles(values)}


def machine(threads: int) -> dict[str, Any]:
    """Describe the machine, its settings and the versions."""
    return {
        "device": default_device().type,
        "processor": device_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": any(  # mkldnn reports emulated bfloat16 as supported
            getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        ),
        "threads": threads,
        "allocator": allocator.settings(),
        "python": platform.python_version(),
        "hf_hardattn": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
