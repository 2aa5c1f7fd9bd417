"""``hf-hardattn compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ._output import place


def command(
    config: Annotated[Path, typer.Option(help="What to compare, e.g. scripts/configs/compare/cluttered_digits.yaml.")],
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 5,
    first_seed: Annotated[int, typer.Option(help="First seed. Tune on seeds other than those you report.")] = 0,
    jobs: Annotated[int, typer.Option(help="Number of parallel processes.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Number of PyTorch threads in each process.", min=1)] = 1,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write; outputs/compare/<name of the config>.json by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder for base checkpoints and runs, from which a comparison continues; outputs/compare/<name of the config> by default."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Variant to run; all by default; may be given several times.")
    ] = None,
    retry: Annotated[bool, typer.Option(help="Run failed runs again.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the trained models in the folder 'models'.")] = False,
    quick: Annotated[
        bool, typer.Option(help="Run a few steps only, to check that everything works; the numbers mean nothing.")
    ] = False,
) -> None:
    """Train several estimators and controls on one task with equal data, budget, steps and seeds, and compare them."""
    from rich.console import Console
    from rich.table import Table

    from ..training.compare import compare
    from ..training.compare_report import cells, draw, is_part_of, markdown, report
    from ..training.comparison import Comparison
    from ..training.results import write_json

    comparison = Comparison.read(config).only(only)
    default = Path("outputs/compare") / (config.stem + "-quick" * quick)
    folder = folder or default
    chosen = list(range(first_seed, first_seed + seeds))
    wanted = output or default.with_name(f"{default.name}.json")
    if not is_part_of(wanted, comparison, quick, chosen):
        wanted = place(output, wanted, overwrite)
    output = wanted
    total, done = seeds * len(comparison.variants), 0

    def show_row(row: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        result = row.get("message") or ", ".join(f"{key} {value:.4f}" for key, value in row["metrics"].items())
        typer.echo(f"{done:>4} of {total}  {row['variant']} seed {row['seed']}: {result}")

    rows = compare(
        comparison, chosen, folder, jobs=jobs, threads=threads, quick=quick, retry=retry, save=save, on_row=show_row
    )
    results = report(
        comparison, rows, shlex.join(["hf-hardattn", *sys.argv[1:]]), quick=quick, jobs=jobs, threads=threads
    )
    write_json(output, results)
    draw(results, output.with_suffix(".png"))
    output.with_suffix(".md").write_text(f"# {results['task']}\n\n{markdown(results)}\n", encoding="utf-8")
    header, lines = cells(results)
    table = Table(title=f"{results['task']}, {seeds} seed{'s' * (seeds > 1)}")
    for name in header:
        table.add_column(name, justify="left" if name == "variant" else "right")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.width = max(console.width, 140)  # it is 80 in a pipe, which would cut the names
    console.print(table)
    for name, summary in results["summary"].items():
        for message in summary["messages"]:
            console.print(f"failed: {name}, {message}")
    console.print(f"results: {output}; plot: {output.with_suffix('.png')}; runs: {folder}")
