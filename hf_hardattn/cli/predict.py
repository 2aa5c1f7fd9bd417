"""``hf-hardattn predict``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ._output import refuse_unused


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint, hard or stock: a folder, or a name on the Hub.")],
    data: Annotated[
        str, typer.Option(help="A csv, tsv, json, jsonl or parquet file, a folder of images, or a data set on the Hub.")
    ],
    column: Annotated[str, typer.Option(help="Column of the texts or images.")],
    split: Annotated[str, typer.Option(help="Split of a data set on the Hub.")] = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Stream a data set from the Hub during prediction.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Parquet file to write; an interrupted run continues when it is started again.")
    ] = Path("outputs/predictions.parquet"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="Budget of every site, which replaces the saved budgets: a ratio, or a count above 1."),
    ] = None,
    pooling: Annotated[str, typer.Option(help="Pooling for a model without a head: mean or cls.")] = "mean",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of generated tokens.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs per call.")] = 32,
    chunk: Annotated[int, typer.Option(min=1, help="Inputs per chunk; a chunk is written in one step.")] = 1024,
) -> None:
    """Predict a large collection into one Parquet file: classes, texts or embeddings, and what was kept of each input.

    Start it with `accelerate launch -m hf_hardattn predict ...` to share the work among processes or machines.
    """
    from ..errors import HardAttentionError
    from ..inference.collection import predict_collection, processes
    from ..inference.predictor import Predictor
    from ..inspection.model_with_processor import ModelWithProcessor

    if output.exists() and not overwrite:
        raise HardAttentionError(
            f"--output {str(output)!r} already exists; existing files are not overwritten by default. Use another, or add --overwrite."
        )
    kept: Any = int(budget) if budget is not None and budget > 1 else budget
    bundle = ModelWithProcessor.load_any(model, budget=kept)
    if bundle.model.can_generate():
        refuse_unused(context, "pooling", "for a model that generates text")
    else:
        refuse_unused(context, "max_new_tokens", "for a model that does not generate text")
    if Path(data).exists():
        refuse_unused(context, "split streaming", "for local files, which are read completely")
    bundle.model.to(processes().device)
    predictor = Predictor(bundle, pooling, max_new_tokens)
    rows = _rows(data, column, split, streaming)
    run = {
        "model": model,
        "data": data,
        "data_state": _state(data, rows),
        "split": split,
        "budget": kept,
        "pooling": pooling,
        "max_new_tokens": max_new_tokens,
    }
    count = predict_collection(predictor, rows, column, output, run=run, batch_size=batch_size, chunk=chunk)
    typer.echo(f"{count:,} rows: {output}")


def _rows(data: str, column: str, split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    from ..errors import HardAttentionError
    from ..inspection.sources import read_table

    rows = read_table(data) if Path(data).exists() else load_dataset(data, split=split, streaming=streaming)
    names = rows.column_names
    if names is not None and column not in names:
        raise HardAttentionError(
            f"no column {column!r} in {data}; it has: {', '.join(names)}. Specify another with --column."
        )
    return rows


def _state(data: str, rows: Any) -> str:
    """Return a hash that changes with the data: names, sizes and times of local files, or the addresses of the files on the Hub.

    The files of a stream are not known before it is read; it is told by its name alone.
    """
    path = Path(data)
    found: list[Any]
    if path.exists():
        files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
        found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    else:
        found = sorted(rows.info.download_checksums or ())
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
