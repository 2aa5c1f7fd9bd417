"""``hf-hardattn bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    output: Annotated[Path, typer.Option(help="File for the results.")] = Path("outputs/bench.json"),
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 15,
    threads: Annotated[int, typer.Option(help="PyTorch threads.")] = 2,
    layers: Annotated[int, typer.Option(help="Layers of the models; 12 in ViT-B and T5-base.")] = 12,
) -> None:
    """Measure what the library costs a soft model, and what selection saves a hard one, against stock SDPA in the same run."""
    from ..efficiency.bench import run

    results = run(rounds=rounds, threads=threads, layers=layers)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    for row in results["rows"]:
        typer.echo(f"{row['case']:<48} counted x{row['counted']:.2f}   measured x{row['measured']:.2f}")
    typer.echo(f"results: {output}")
