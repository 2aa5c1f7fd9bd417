"""What a training script does, from its command line to ``results.json``."""

from __future__ import annotations

import sys
from typing import Any

from .finetuning import choose
from .loop import start, train
from .parsing import expand, parse


def fine_tune(family: str, argv: list[str] | None = None) -> dict[str, Any]:
    """Train a model of ``family`` for the task that the flags name.

    Args:
        family: vit, t5 or blip. argv: flags; the command line's by default.

    Returns:
        What ``results.json`` says.
    """
    words = expand(sys.argv[1:] if argv is None else argv)
    task = choose(words, family)
    args = parse(task.Arguments, words)
    accelerator = start(args)
    return train(accelerator, args, task(args, accelerator).setup(), argv)
