"""``hf-hardattn explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import HardAttentionError
from ._output import place


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, a name on the Hub, or 'sample'.")],
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, image, folder of images, or table with --column; may be given several times. The model 'sample' comes with its own."
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the table given by --input.")] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of inputs.")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="File to write the page to; outputs/report.html by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
    measure: Annotated[
        bool, typer.Option(help="Also measure faithfulness, which takes several hundred forward passes.")
    ] = True,
    beside: Annotated[
        str | None, typer.Option(help="Another checkpoint, hard or not, to show next to the first for every input.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "",
) -> None:
    """Write a self-contained page that shows what a hard model kept, what that proves, and what it does not."""
    from .. import sample
    from ..inspection.model_with_processor import ModelWithProcessor
    from ..inspection.report import explain
    from ..inspection.sources import read_inputs

    output = place(output, Path("outputs/report.html"), overwrite)
    if not input and model != sample.NAME:
        raise HardAttentionError(
            "there is no --input to explain; pass an image, a text, a folder of images, or a table with --column."
        )
    named = input or map(str, sample.image_paths())
    inputs = [item for given in named for item in read_inputs(given, column, limit)][:limit]
    other = None if beside is None else ModelWithProcessor.load_any(beside)
    if measure:
        typer.echo(
            f"measuring faithfulness on {len(inputs)} input{'s' * (len(inputs) != 1)} takes several hundred forward passes; use --no-measure to skip it",
            err=True,
        )
    page = explain(ModelWithProcessor.load(model), inputs, measure, title, other)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    typer.echo(
        f"{len(inputs)} input{'s' * (len(inputs) != 1)} explained; page: {output} ({len(page.encode()) / 1000:.0f} kB)"
    )
