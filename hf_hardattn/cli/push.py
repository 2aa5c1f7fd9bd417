"""``hf-hardattn push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Folder written by hf_hardattn.save or save_pretrained.")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub; created if it does not exist.")],
    dry_run: Annotated[bool, typer.Option(help="Only show what would be uploaded, and who could see it.")] = True,
    public: Annotated[
        bool, typer.Option("--public", help="Create the repository as public instead of private.")
    ] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag of the new commit.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload hard model",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob of files to leave out; may be given several times.")
    ] = None,
) -> None:
    """Upload a hard model to the Hub; a dry run unless --no-dry-run. Log in with 'hf auth login' or HF_TOKEN."""
    from ..hub.pushing import push

    plan = push(
        folder,
        repo_id,
        dry_run=dry_run,
        public=public,
        branch=branch,
        tag=tag,
        pull_request=pull_request,
        message=message,
        exclude=tuple(exclude or ()),
    )
    typer.echo(str(plan))
    if dry_run:
        typer.echo("dry run; to push, run the same command with --no-dry-run")
