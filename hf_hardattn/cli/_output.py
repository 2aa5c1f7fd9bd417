"""What all commands keep to: they write over nothing that is there already, and no option is left without effect."""

from __future__ import annotations

import itertools
from pathlib import Path

import typer

from ..errors import HardAttentionError


def place(wanted: Path | None, default: Path, overwrite: bool = False) -> Path:
    """The file or folder to write.

    Args:
        wanted: what the user names, or None. default: used otherwise; where it exists, a number is added to its name.
        overwrite: take it although it exists.

    Raises:
        HardAttentionError: ``wanted`` exists.
    """
    if overwrite:
        return wanted or default
    if wanted is not None:
        if _is_taken(wanted):
            raise HardAttentionError(
                f"--output {str(wanted)!r} exists already; nothing is overwritten unasked. Name another, or add --overwrite."
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
        names: of the options, as the command's parameters are called, separated by spaces. why: they have none; ends the sentence.

    Raises:
        HardAttentionError: one was given.
    """
    for name in names.split():
        if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            raise HardAttentionError(f"--{name.replace('_', '-')} has no effect {why}. Leave it out.")
