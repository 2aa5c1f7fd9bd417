"""Run a training script, from its command line to ``results.json``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import HardAttentionError
from .finetuning import choose
from .flag_help import show
from .parsing import expand, parse, peek
from .running import start, train


def fine_tune(family: str, argv: list[str] | None = None, command: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train a model of ``family`` for the task that the flags name.

    Args:
        family: vit, t5, blip, encoder or decoder. argv: flags; those of the command line by default.
        command: words before the flags, for the record.

    Returns:
        The content of ``results.json``.

    Raises:
        HardAttentionError: for example, ``output_dir`` holds another run.
    """
    words = expand(sys.argv[1:] if argv is None else argv)
    if any(word in ("--help", "-h") for word in words):
        print(show(family, peek(words, "task"), f"{Path(sys.argv[0]).name} {' '.join(command[:1])}".strip()))
        raise SystemExit(0)
    task = choose(words, family)
    args = parse(task.Arguments, words)
    if not args.resume_from_checkpoint and not args.overwrite:
        refuse_to_overwrite(Path(args.output_dir))
    accelerator = start(args)
    return train(accelerator, args, task(args, accelerator).setup(), None if argv is None else [*command, *argv])


def refuse_to_overwrite(folder: Path) -> None:
    """Raise if a folder holds a model or the record of a run.

    Raises:
        HardAttentionError: the folder holds a run.
    """
    found = next(
        (
            name
            for name in ("results.json", "config.json", "adapter_config.json", "checkpoints")
            if (folder / name).exists()
        ),
        None,
    )
    if found is not None:
        raise HardAttentionError(
            f"--output_dir {str(folder)!r} holds an earlier run ({found}); existing files are not overwritten by default. Use another "
            "folder, add --overwrite, or continue it with --resume_from_checkpoint latest."
        )
