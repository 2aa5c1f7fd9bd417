"""The command line, ``hf-hardattn``. Each command has a file of its own, which has the command's name and defines ``command``.

At their top these files import only ``errors`` from the library, so that ``--help`` does not wait for PyTorch.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import Annotated

import typer

from ..errors import HardAttentionError
from ..version import __version__

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="Token selection (hard attention) for pretrained Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=HELP,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-hardattn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _module in pkgutil.iter_modules(__path__):
    if _module.name.startswith("_"):
        continue
    _file = importlib.import_module(f"{__name__}.{_module.name}")
    _settings = HELP | getattr(_file, "SETTINGS", {})
    app.command(_module.name.replace("_", "-"), context_settings=_settings)(_file.command)


def main() -> None:
    """Entry point of ``hf-hardattn``; errors that the user can fix are printed in one line, without a traceback.

    ``HF_HARDATTN_TRACEBACK=1`` shows the traceback as well.
    """
    try:
        app(prog_name="hf-hardattn")
    except (HardAttentionError, ImportError, OSError) as error:
        if os.environ.get("HF_HARDATTN_TRACEBACK"):
            raise
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, with its type if the message alone says little, as for a missing file."""
    text = " ".join(str(error).split())
    if len(text) > 2000:
        text = f"{text[:2000]} ..."
    if isinstance(error, HardAttentionError) or (isinstance(error, ImportError) and "pip install" in text):
        return text
    return f"{type(error).__name__}: {text} (HF_HARDATTN_TRACEBACK=1 shows where)"
