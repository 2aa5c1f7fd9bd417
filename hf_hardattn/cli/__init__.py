"""The command line: ``hf-hardattn demo | list | env | bench``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Hard attention for Hugging Face Transformers.", no_args_is_help=True, add_completion=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, picture and results.")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 4,
    threads: Annotated[int, typer.Option(help="PyTorch threads; 0 leaves the choice to PyTorch.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps only: a check that everything runs, not a result.")] = False,
) -> None:
    """Train and compare three small ViTs on cluttered digits: soft, hard, and a random choice."""
    from rich.console import Console
    from rich.table import Table

    from ..training.demo import Recipe, run

    recipe = Recipe(seed=seed)
    if quick:
        recipe = replace(recipe, trunk_steps=6, branch_steps=6, ramp=3, test_images=250)
    results = run(recipe, output, threads or None)
    where = results["measured"]
    table = Table(
        title=f"Cluttered digits, {recipe.test_images:,} test images",
        caption=f"measured: {where['device']}, {where['threads']} threads, batch {where['batch']}, {where['dtype']}, median of {where['rounds']} rounds",
    )
    for column in ("model", "accuracy", "kept", "GFLOPs an image (counted)", "images/s (measured)", "x soft"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in results["models"].items():
        table.add_row(
            name,
            f"{row['accuracy']:.1%}",
            f"{row['kept']:.0%}",
            f"{row['gflops']:.4f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['speedup']:.2f}",
        )
    console = Console()
    console.print(table)
    for site in results["certificate"]["sites"]:
        console.print(site["statement"])
    again = results["reload"]
    console.print(
        f"reloaded in a fresh process: {'hard' if again['hard'] else 'SOFT'}, {again['patches_kept']} patches kept, "
        f"accuracy {again['accuracy']:.1%} ({'the same' if again['same_accuracy'] else 'NOT the same'})"
    )
    console.print(
        f"{results['seconds']:.0f} s in all; picture: {output / 'kept_patches.png'}; results: {output / 'results.json'}"
    )


@app.command("list")
def list_() -> None:
    """List what is registered: scorers, estimators, baselines, architectures."""
    from .. import registry

    for kind in registry.KINDS:
        typer.echo(f"{kind}:")
        for name in registry.names(kind):
            lines = (registry.load(kind, name).__doc__ or "").strip().splitlines()
            typer.echo(f"  {name:<18}{lines[0] if lines else ''}")


@app.command()
def env() -> None:
    """Print versions and devices, for a bug report."""
    import importlib.metadata
    import platform

    import torch

    packages = ("hf-hardattn", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "huggingface_hub")
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": torch.get_num_threads(),
    }
    facts |= {name: importlib.metadata.version(name) for name in packages}
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    typer.echo(json.dumps(facts, indent=2))


@app.command()
def bench(
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


def main() -> None:
    """Entry point of ``hf-hardattn``."""
    app()
