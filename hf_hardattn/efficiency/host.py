"""Host cost of selection, compared with stock: the kernels that it launches and the processor time of a call.

With a small model or a batch of one, a GPU waits for the host: each operation costs some microseconds of Python and dispatch, however
little it computes. Both are measured here on the CPU, with models of 12 layers that are so narrow that only this time remains.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from ..api import apply

LAYERS, TOKENS, NEW_TOKENS = 12, 64, 16
TURNS, TURNS_GENERATING = 25, 5  # calls of each model per round: a generate() has 16 forward passes
STOCK, AGAIN = "stock", "stock, again"
# operations that allocate without launching a kernel
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}


@dataclass(frozen=True)
class HostRow:
    """One hard configuration of a workload.

    Attributes:
        name: name in the report. hard: the configuration.
        most_kernels: most kernels that it may add to those of stock; None for no limit.
        most_host: most processor time relative to stock; None for no limit.
    """

    name: str
    hard: dict[str, Any]
    most_kernels: int | None = None
    most_host: float | None = None


@dataclass(frozen=True)
class HostWorkload:
    """A narrow model of 12 layers, a call, and its rows.

    Attributes:
        build: builds the stock model. inputs: returns the keyword inputs of one call. generates: whether the call is ``generate()``.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    rows: tuple[HostRow, ...]
    generates: bool = False

    def call(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Run the call that is counted and timed."""
        with torch.inference_mode():
            if self.generates:
                model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            else:
                model(**inputs)


class KernelCounter(TorchDispatchMode):
    """Counts the operations that launch a kernel, by name, in ``operations``.

    Views and allocations are not counted: a view is an operation whose outputs all share the memory of its inputs, unless it writes to it.
    Therefore ``to``, ``reshape`` and ``contiguous`` count only if they copy. The number of copies that stock makes after its attention
    depends on the shapes, and a hard model may make fewer. In inference mode a composite operation (``linear``, ``layer_norm``) counts
    once, as it is one kernel on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in ALLOCATIONS and (func._schema.is_mutable or not _inside(output, (args, kwargs))):
            self.operations[name] += 1
        return output


def _inside(output: Any, inputs: Any) -> bool:
    """Whether all tensors of ``output`` share the memory of ``inputs``; False if there are none."""
    found, given = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (output, inputs))
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    return bool(found) and all(tensor.untyped_storage().data_ptr() in memory for tensor in found)


def count_kernels(call: Callable[[], object]) -> Counter[str]:
    """Count the kernels that ``call`` launches, by operation. Run it once before, so that one-time initialisation is not counted."""
    with KernelCounter() as counter:
        call()
    return counter.operations


def added_kernels(workload: HostWorkload) -> dict[str, Counter[str]]:
    """Return the kernels that each row launches in addition to stock, by row and operation; negative if it launches fewer."""
    return _added(_calls(workload))


def _added(calls: Mapping[str, Callable[[], object]]) -> dict[str, Counter[str]]:
    for call in calls.values():  # exclude one-time initialisation from the count
        call()
    counts = {name: count_kernels(call) for name, call in calls.items()}
    stock, added = counts.pop(STOCK), {}
    for name, operations in counts.items():
        operations.subtract(stock)
        added[name] = Counter({operation: count for operation, count in operations.items() if count})
    return added


def _calls(workload: HostWorkload) -> dict[str, Callable[[], object]]:
    """Return the call of the stock model and that of a hard copy for each row."""
    torch.manual_seed(0)
    stock, inputs = workload.build().eval(), workload.inputs()
    models = {STOCK: stock, **{row.name: apply(copy.deepcopy(stock), row.hard).eval() for row in workload.rows}}
    return {name: partial(workload.call, model, inputs) for name, model in models.items()}


def measure(workload: HostWorkload, *, rounds: int, seconds: float | None = None) -> dict[str, Any]:
    """Count and time a workload with its rows.

    Args:
        rounds: maximum number of rounds; in each, every model has ``TURNS`` turns. seconds: time after which no further round starts (at
            least two are run).

    Returns:
        JSON: seconds of stock, and the ratio of the same call timed as if it were another row (``again``), which shows the error of the
        measurement; for each row the added kernels in total and by operation, its processor time relative to stock, and its limits.
    """
    calls = _calls(workload)
    kernels = _added(calls)
    turns = TURNS_GENERATING if workload.generates else TURNS
    timed = processor_seconds({**calls, AGAIN: calls[STOCK]}, rounds=rounds, turns=turns, seconds=seconds)
    return {
        "name": workload.name,
        "stock_seconds": statistics.median(timed[STOCK]),
        "again": _by_stock(timed, AGAIN),
        "rows": [_row(row, kernels[row.name], _by_stock(timed, row.name)) for row in workload.rows],
    }


def _row(row: HostRow, kernels: Counter[str], host: dict[str, Any]) -> dict[str, Any]:
    added = kernels.total()
    return {
        **vars(row),
        "kernels_added": added,
        "operations": dict(kernels.most_common()),
        "host": host,
        "held": _held(added, host["median"], row),
    }


def _by_stock(timed: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    ratios = [own / base for own, base in zip(timed[name], timed[STOCK], strict=True)]
    middle = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "quartiles": middle, "rounds": len(ratios)}


def processor_seconds(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, turns: int, seconds: float | None = None
) -> dict[str, list[float]]:
    """Measure the processor time of this thread for each call, as the median over the turns of each round. Other processes do not count.

    The order is reversed from turn to turn, so that the same call does not always precede a call and determine the state of its caches.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    started = time.monotonic()
    collecting = gc.isenabled()
    gc.disable()  # otherwise one call pays for the garbage of the others
    try:
        for round_ in range(rounds):
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(turns):
                for name in list(calls)[:: -1 if turn % 2 else 1]:
                    before = time.thread_time()
                    calls[name]()
                    taken[name].append(time.thread_time() - before)
            for name, times in taken.items():
                found[name].append(statistics.median(times))
            gc.collect()
            if seconds is not None and round_ and time.monotonic() - started > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return found


def run(*, rounds: int, seconds: float | None) -> Iterator[dict[str, Any]]:
    """Measure every workload; see ``measure``."""
    torch.set_num_threads(1)  # so that all of the time is spent in this thread
    for workload in WORKLOADS:
        yield measure(workload, rounds=rounds, seconds=seconds)


def _held(kernels: int, host: float, row: HostRow) -> bool:
    """Whether the measurement is within the limits of a row."""
    return (row.most_kernels is None or kernels <= row.most_kernels) and (
        row.most_host is None or host <= row.most_host
    )


# ---------------------------------------------------------------------------------------------------------------- the workloads


_NARROW: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 32,
}
_IMAGES: dict[str, Any] = {"image_size": 96, "patch_size": 16}
_TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "encoder_hidden_size": 24,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "sep_token_id": 98,
    "pad_token_id": 0,
}


def _vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**_NARROW, **_IMAGES))


def _t5_config() -> T5Config:
    sizes: dict[str, Any] = dict(d_model=24, d_kv=8, d_ff=32, num_layers=LAYERS, num_heads=3, vocab_size=100)
    sizes["decoder_start_token_id"] = 0
    return T5Config(**sizes)


def _blip() -> nn.Module:
    return BlipForConditionalGeneration(
        BlipConfig(text_config={**_NARROW, **_TEXT}, vision_config={**_NARROW, **_IMAGES})
    )


def _pixels() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(1, 3, 96, 96)}


def _ids() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(5, 99, (1, TOKENS))}


def _masked_ids() -> dict[str, Any]:
    ids = _ids()["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _padded_ids() -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(5, 99, (2, TOKENS))
    mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS // 2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _everything(*sites: str) -> HostRow:
    """Return a row that keeps everything and must therefore cost nothing."""
    return HostRow(f"{', '.join(sites)} keep all", {"sites": list(sites), "budget": 1.0}, 0, 1.03)


WORKLOADS = (
    HostWorkload(
        "ViT, 12 layers",
        _vit,
        _pixels,
        (
            HostRow("vision.tokens.0 keep .25", {"sites": ["vision.tokens.0"], "budget": 0.25}, 12, 1.10),
            HostRow(
                "vision.tokens.2, .5, .8 keep .7",
                {"sites": [f"vision.tokens.{layer}" for layer in (2, 5, 8)], "budget": 0.7},
                36,
                1.2,
            ),
            HostRow("vision.self.* keep .25", {"sites": ["vision.self.*"], "budget": 0.25}, 12 * LAYERS, 1.5),
            _everything("vision.inputs"),
            _everything("vision.tokens.0"),
            _everything("vision.self.*"),
        ),
    ),
    HostWorkload(
        "T5 encoder, 12 layers, no mask",
        lambda: T5EncoderModel(_t5_config()),
        _ids,
        (
            HostRow("encoder.tokens.0 keep .25", {"sites": ["encoder.tokens.0"], "budget": 0.25}, 12, 1.08),
            _everything("encoder.inputs", "encoder.tokens.*", "encoder.self.*"),
        ),
    ),
    HostWorkload(
        "T5 encoder, 12 layers, a mask without padding",
        lambda: T5EncoderModel(_t5_config()),
        _masked_ids,
        (
            HostRow("encoder.tokens.0 keep .25", {"sites": ["encoder.tokens.0"], "budget": 0.25}, 12, 1.08),
            _everything("encoder.inputs", "encoder.tokens.*", "encoder.self.*"),
        ),
    ),
    HostWorkload(
        "T5 encoder, 12 layers, two rows of different length",
        lambda: T5EncoderModel(_t5_config()),
        _padded_ids,
        (
            HostRow("encoder.tokens.0 keep .25", {"sites": ["encoder.tokens.0"], "budget": 0.25}, 14, 1.08),
            HostRow("encoder.self.* keep .25", {"sites": ["encoder.self.*"], "budget": 0.25}, 17 * LAYERS),
        ),
    ),
    HostWorkload(
        f"T5, 12 + 12 layers, {NEW_TOKENS} tokens generated",
        lambda: T5ForConditionalGeneration(_t5_config()),
        _masked_ids,
        (
            HostRow("decoder.cross.* keep .25", {"sites": ["decoder.cross.*"], "budget": 0.25}, 120, 1.15),
            HostRow("encoder.tokens.0 keep .25", {"sites": ["encoder.tokens.0"], "budget": 0.25}, 12, 1.08),
            _everything("decoder.self.*", "decoder.cross.*"),
        ),
        generates=True,
    ),
    HostWorkload(
        f"BLIP, 12 + 12 layers, {NEW_TOKENS} tokens generated",
        _blip,
        _pixels,
        (_everything("vision.inputs", "vision.tokens.*", "vision.self.*", "text.self.*", "text.cross.*"),),
        generates=True,
    ),
)
