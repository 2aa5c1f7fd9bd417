"""Predict a whole collection in chunks, which processes share and write once, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock, Timeout
from pyarrow import parquet
from tqdm.auto import tqdm

from ..devices import default_device
from ..errors import HardAttentionError
from ..hub.fingerprints import fingerprint_of_all
from ..version import __version__
from .predictor import Predictor

# Types of the output columns; columns that the prediction does not have are left out.
TYPES = {
    "index": pyarrow.int64(),
    "label": pyarrow.string(),
    "score": pyarrow.float32(),
    "text": pyarrow.string(),
    "embedding": pyarrow.list_(pyarrow.float32()),
    "kept": pyarrow.list_(pyarrow.int32()),
    "kept_share": pyarrow.float32(),
    "seconds": pyarrow.float32(),
}


def predict_collection(
    predictor: Predictor,
    rows: Any,
    column: str,
    output: Path,
    *,
    run: dict[str, Any],
    batch_size: int = 32,
    chunk: int = 1024,
) -> int:
    """Predict every row and write one Parquet file, in the order of the rows.

    Process ``c % n`` predicts chunk ``c`` and writes it atomically to a folder beside the output. An interrupted run continues with
    the missing chunks. The predictions depend only on the chunk, and therefore neither on the number of processes nor on
    interruptions.

    Args:
        rows: a ``datasets.Dataset``, or an ``IterableDataset``, which every process reads. column: its column of texts or images.
        output: the file. run: settings that a resumed run must share, written beside the chunks. batch_size: rows per call, >= 1.
        chunk: rows per chunk, >= 1; within a chunk, rows of similar length form a batch.

    Returns:
        The number of rows.

    Raises:
        HardAttentionError: the existing chunks are from another run, of other data or of another model; another run is writing them; a
            row cannot be predicted. The rows of a ``Dataset`` of texts are read before the first one is predicted.
    """
    state = processes()
    parts = output.with_name(f"{output.name}.parts")
    with ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                _check_texts(predictor, rows, column, chunk)
                parts.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(parts))
                settings = {"column": column, "batch_size": batch_size, "chunk": chunk}
                _open_parts(parts, run | settings | _versions(predictor, rows))
        count = 0
        chunks = _chunks(rows, column, chunk)
        for number, start, inputs in tqdm(chunks, "predict", disable=not state.is_main_process, unit="chunk"):
            count = start + len(inputs)
            path = parts / f"{number:08d}.parquet"
            if number % state.num_processes == state.process_index and not path.exists():
                predictor.check(inputs, start)
                _write(path, _table(predictor, [_opened(value) for value in inputs], start, batch_size))
        state.wait_for_everyone()
        if state.is_main_process:
            _join(parts, output, -(-count // chunk))
        state.wait_for_everyone()
    return count


def processes() -> PartialState:
    """Return the processes that share the work. Accelerate finds processes without an accelerator only if it is told to use the CPU."""
    return PartialState(cpu=default_device().type == "cpu")


@contextmanager
def _locked(parts: Path) -> Iterator[None]:
    """Keep other runs out of the folder of chunks. The system ends the lock of a process that ends, in whatever way."""
    lock = FileLock(parts / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise HardAttentionError(
            f"{parts} is being written by another run; one run at a time writes an output. Wait until it ends, or name another --output."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _versions(predictor: Predictor, rows: Any) -> dict[str, Any]:
    """Return what else must be the same when a run is resumed: number of rows, weights with their configuration, and this library."""
    config = predictor.model.model.config.to_json_string()
    return {
        "rows": len(rows) if isinstance(rows, Dataset) else None,
        "weights": fingerprint_of_all(predictor.model.model),
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "hf_hardattn": __version__,
    }


def _check_texts(predictor: Predictor, rows: Any, column: str, size: int) -> None:
    """Check every text before hours of work; images are not decoded twice, and a stream is read once."""
    if isinstance(rows, Dataset) and not predictor.model.takes_images:
        for _, start, inputs in _chunks(rows, column, size):
            predictor.check(inputs, start)


def _open_parts(parts: Path, run: dict[str, Any]) -> None:
    path = parts / "run.json"
    if not path.exists() or not any(parts.glob("*.parquet")):  # without a chunk, there is nothing to go on with
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in run if before.get(name) != run[name]]
    if other:
        raise HardAttentionError(
            f"{parts} holds chunks of another run: {', '.join(f'{name} was {before.get(name)!r}, is {run[name]!r}' for name in other)}. "
            "Remove the folder to start from scratch, or use another --output."
        )


def _chunks(rows: Any, column: str, size: int) -> Iterator[tuple[int, int, list[Any]]]:
    """Yield number, first row and inputs of each chunk; a ``Dataset`` is read chunk by chunk, a stream once from its start."""
    if isinstance(rows, Dataset):
        for number, start in enumerate(range(0, len(rows), size)):
            yield number, start, rows[start : start + size][column]
        return
    stream = iter(rows)
    for number in itertools.count():
        inputs = [row[column] for row in itertools.islice(stream, size)]
        if not inputs:
            return
        yield number, number * size, inputs


def _opened(value: Any) -> Any:
    return value.convert("RGB") if hasattr(value, "convert") else value


def _table(predictor: Predictor, inputs: list[Any], start: int, batch_size: int) -> pyarrow.Table:
    lengths = predictor.lengths(inputs)
    order = sorted(range(len(inputs)), key=lambda i: lengths[i])
    columns: dict[str, list[Any]] = {"index": [start + i for i in order], "seconds": []}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        started = time.perf_counter()
        found = predictor([inputs[i] for i in batch])
        columns["seconds"] += [(time.perf_counter() - started) / len(batch)] * len(batch)
        for name, values in found.items():
            columns.setdefault(name, []).extend(values)
    names = [name for name in TYPES if name in columns]
    table = pyarrow.table({name: pyarrow.array(columns[name], TYPES[name]) for name in names})
    return table.sort_by("index")


def _write(path: Path, table: pyarrow.Table) -> None:
    """Write a file atomically, so that an existing file is always complete."""
    temporary = path.with_suffix(f".{os.getpid()}")
    parquet.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def _join(parts: Path, output: Path, count: int) -> None:
    temporary = output.with_name(f"{output.name}.{os.getpid()}")
    paths = [parts / f"{number:08d}.parquet" for number in range(count)]
    if not paths:
        raise HardAttentionError("the data has no rows to predict.")
    with parquet.ParquetWriter(temporary, parquet.read_schema(paths[0]), compression="zstd") as writer:
        for path in paths:
            writer.write_table(parquet.read_table(path))
    temporary.replace(output)
    shutil.rmtree(parts)
