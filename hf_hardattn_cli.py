"""Entry point of ``hf-hardattn``: what needs no model, such as ``--help``, is answered before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

QUICK = ("--help", "-h", "--version")


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if not words or any(word in QUICK for word in words):
        _stand_in()
    from hf_hardattn.cli import main as run

    run()


def _stand_in() -> None:
    """Let modules of the package be imported without the package itself, whose import registers hard attention with Transformers."""
    spec = importlib.util.find_spec("hf_hardattn")
    if spec is not None:
        sys.modules["hf_hardattn"] = importlib.util.module_from_spec(spec)
        modules: dict[str, Any] = sys.modules
        modules["torch"] = None  # a command that needs it would run soft: importing it is an error here


if __name__ == "__main__":
    main()
