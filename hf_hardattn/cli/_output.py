"""Rules of all commands: they do not overwrite existing files, and they refuse options that would have no effect."""

from __future__ import annotations

import itertools
from pathlib import Path

import typer

from ..errors import HardAttentionError


def place(wanted: Path | None, default: Path, overwrite: bool = False) -> Path:
    """Return the file or folder to write.

    Args:
        wanted: path named by the user, or None. default: used otherwise; if it exists, a number is added to its name.
        overwrite: use the path even if it exists.

    Raises:
        HardAttentionError: ``wanted`` exists.
    """
    if overwrite:
        return wanted or default
    if wanted is not None:
        if _is_taken(wanted):
            raise HardAttentionError(
                f"--output {str(wanted)!r} already exists; existing files are not overwritten by default. Use another, or add --overwrite."
            )
        return wanted
    names = itertools.chain(
        [default], (default.with_name(f"{default.stem}-{n}{default.suffix}") for n in itertools.count(2))
    )
    return next(name for name in names if not _is_taken(name))


def _is_taken(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def refuse_unused(context: typer.Context, names: str, why: str) -> None:
    """Raise for an option of the command line that would have no effect.

    Args:
        names: parameter names of the options, separated by spaces. why: reason, which ends the sentence of the message.

    Raises:
        HardAttentionError: one of the options was given.
    """
    for name in names.split():
        if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            raise HardAttentionError(f"--{name.replace('_', '-')} has no effect {why}. Leave it out.")
