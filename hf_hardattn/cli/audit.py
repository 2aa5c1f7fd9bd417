"""``hf-hardattn audit``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ._output import place


def command(
    model: Annotated[str, typer.Argument(help="Hard checkpoint: a folder, a name on the Hub, or 'sample'.")],
    data: Annotated[
        str,
        typer.Option(
            help="Folder with one folder of images for each class; a csv, json or parquet file; or a saved data set."
        ),
    ],
    column: Annotated[str, typer.Option(help="Column with the images or texts.")] = "image",
    by: Annotated[list[str] | None, typer.Option(help="Column with the subgroups; may be given several times.")] = None,
    site: Annotated[str | None, typer.Option(help="Site to audit; the first by default.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows to read.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 32,
    output: Annotated[
        Path | None, typer.Option(help="File to write the findings to; outputs/audit.json by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
) -> None:
    """Report what a hard model keeps and drops systematically: by subgroup, position, border, length and rare words."""
    from ..inspection.audit import CAUTION
    from ..inspection.dataset_audit import audit_rows
    from ..inspection.model_with_processor import ModelWithProcessor
    from ..inspection.sources import read_table

    output = place(output, Path("outputs/audit.json"), overwrite)
    rows = read_table(data)
    rows = rows.select(range(min(limit, len(rows))))
    findings = audit_rows(ModelWithProcessor.load(model), rows, column, by or [], site, batch)
    for finding in findings:
        typer.echo(("* " if finding.notable else "  ") + finding.sentence)
    typer.echo("* marks notable findings.")
    typer.echo(CAUTION)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["hf-hardattn", *sys.argv[1:]]),
        "findings": [f.to_dict() for f in findings],
        "caution": CAUTION,
    }
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"findings: {output}")
