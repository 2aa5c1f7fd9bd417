"""``hf-hardattn card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._output import refuse_unused


def command(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Output folders of training runs, or sources of cards (source.json); with --check, folders that contain a card."
        ),
    ],
    check: Annotated[
        bool,
        typer.Option("--check", help="Check cards instead of writing them; exits with code 1 if anything is wrong."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for one card; the folder of its source by default.")
    ] = None,
    repo_id: Annotated[
        str | None,
        typer.Option(help="Repository, user/name, to state in the card of a training run; --hub_model_id by default."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that this command did not write.")
    ] = False,
) -> None:
    """Write model cards from results JSON: hf-hardattn card outputs/vit, or check them: hf-hardattn card --check outputs/vit."""
    from ..errors import HardAttentionError
    from ..hub.card import refuse_foreign_card, write_card
    from ..hub.card_check import check_card
    from ..hub.run_card import source_for

    if not check:
        if output is not None and len(paths) > 1:
            raise HardAttentionError(
                f"--output is for one card; {len(paths)} are given. Leave it out to write each next to its source."
            )
        for path in paths:
            source = source_for(path, repo_id)
            if not overwrite:
                refuse_foreign_card(output or source.parent)
            typer.echo(f"wrote {write_card(source, output)}")
        return
    refuse_unused(context, "output repo_id overwrite", "with --check, which writes nothing")
    wrong = 0
    for path in paths:
        folder = path.parent if path.is_file() else path
        problems = check_card(folder)
        wrong += bool(problems)
        typer.echo(f"{folder}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
        for problem in problems:
            typer.echo(f"  {problem}", err=True)
    if wrong:
        raise typer.Exit(1)
