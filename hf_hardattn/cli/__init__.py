"""The command line, ``hf-hardattn``. One file a command: the file's name is the command's, its ``command`` does it."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import typer

from ..errors import HardAttentionError

app = typer.Typer(help="Hard attention for Hugging Face Transformers.", no_args_is_help=True, add_completion=False)

for _module in pkgutil.iter_modules(__path__):
    _file = importlib.import_module(f"{__name__}.{_module.name}")
    app.command(_module.name.replace("_", "-"), context_settings=getattr(_file, "SETTINGS", None))(_file.command)


def main() -> None:
    """Entry point of ``hf-hardattn``; what the user can mend is told in one line, without a traceback."""
    try:
        app()
    except HardAttentionError as error:
        sys.exit(f"error: {error}")
