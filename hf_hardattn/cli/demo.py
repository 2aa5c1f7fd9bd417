"""``hf-hardattn demo``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import HardAttentionError
from ._output import refuse_unused

DEFAULT = Path("outputs/demo")


def command(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option(help="Folder for models, picture and results; outputs/demo by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the contents of the output folder.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the data and the selections.")] = 4,
    threads: Annotated[int, typer.Option(help="Number of PyTorch threads; 0 for PyTorch's default.")] = 0,
    quick: Annotated[
        bool, typer.Option(help="Run a few steps only, to check that everything works; the numbers mean nothing.")
    ] = False,
    ui: Annotated[
        bool, typer.Option("--ui", help="Serve a page that shows full attention and hard attention side by side.")
    ] = False,
    space: Annotated[Path | None, typer.Option(help="Write that page as a Hugging Face Space to this folder.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hard checkpoint to show on the page, the demo's or 'sample' by default; may be given several times."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the page.")] = None,
) -> None:
    """Train and compare three small ViTs on cluttered digits (full attention, hard, random selection), or serve a page (--ui)."""
    if ui or space:
        refuse_unused(context, "overwrite seed threads quick", "with --ui or --space, which train nothing")
        if model:
            refuse_unused(context, "output", "with --model, which defines what is shown")
        if space:
            refuse_unused(context, "port", "with --space, which only writes the page")
        return page(model or [_trained(output) if output else _newest()], space, port)
    refuse_unused(context, "model port", "without --ui or --space")
    from rich.console import Console
    from rich.table import Table

    from ..training.demo import Recipe, run

    if output is None:
        # a quick run is not a result and must not replace one
        output = DEFAULT.with_name("demo-quick") if quick else DEFAULT
    elif output.is_dir() and any(output.iterdir()) and not overwrite:
        raise HardAttentionError(
            f"--output {str(output)!r} is not empty; existing files are not overwritten by default. Use another folder, or add --overwrite."
        )
    recipe = Recipe(seed=seed)
    if quick:
        recipe = replace(recipe, trunk_steps=6, branch_steps=6, ramp=3, test_images=250)
    results = run(recipe, output, threads or None)
    where = results["measured"]
    table = Table(
        title=f"Cluttered digits, {recipe.test_images:,} test images",
        caption=f"measured: {where['device']}, {where['threads']} threads, batch {where['batch']}, {where['dtype']}, median of {where['rounds']} rounds",
    )
    for column in ("model", "accuracy", "kept", "GFLOPs per image (counted)", "images/s (measured)", "x soft"):
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
    if quick:
        console.print("a quick run: it only checks that everything works; the numbers mean nothing")
    for site in results["certificate"]["sites"]:
        console.print(site["statement"])
    again = results["reload"]
    console.print(
        f"reloaded in a fresh process: {'hard' if again['hard'] else 'SOFT'}, {again['patches_kept']} patches kept, "
        f"accuracy {again['accuracy']:.1%} ({'the same' if again['same_accuracy'] else 'NOT the same'})"
    )
    console.print(
        f"{results['seconds']:.0f} s in total; picture: {output / 'kept_patches.png'}; results: {output / 'results.json'}"
    )


def _trained(output: Path) -> str:
    """Return the hard model of the demo.

    Raises:
        HardAttentionError: the model has not been trained yet.
    """
    if not (output / "hard" / "config.json").is_file():
        raise HardAttentionError(
            f"{output / 'hard'} holds no model; the page shows that of the demo. Run 'hf-hardattn demo' first, or pass a hard checkpoint as --model."
        )
    return str(output / "hard")


def _newest() -> str:
    """Return the hard model of the demo if it has been trained, else the sample of the package."""
    trained = DEFAULT / "hard" / "config.json"
    return str(trained.parent) if trained.is_file() else "sample"


def page(models: list[str], space: Path | None, port: int | None) -> None:
    """Write the page as a Space, or serve it."""
    from ..inspection.playground import launch
    from ..inspection.space import write_space

    if space:
        typer.echo(f"{space}: {', '.join(write_space(space, models))}")
        typer.echo(f"push it: hf upload USER/NAME {space} --repo-type space")
        return
    launch(models, port)
