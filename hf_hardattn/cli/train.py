"""``hf-hardattn train``."""

from __future__ import annotations

from typing import Annotated

import typer

# the flags belong to the training and are parsed as in its scripts, and so is --help after the family
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
FAMILIES = ("vit", "t5", "blip", "encoder", "decoder")
HELP = ("--help", "-h")


def command(
    context: typer.Context,
    family: Annotated[str | None, typer.Argument(help="vit, t5, blip, encoder or decoder.")] = None,
) -> None:
    """Fine-tune a ViT, T5, BLIP or a decoder (Llama, Qwen, Mistral, Gemma): 'hf-hardattn train vit --help' lists the flags.

    Flags come from the command line and from --config FILE.yaml; --task names the task. For several processes use
    accelerate launch -m hf_hardattn train vit ..., or torchrun -m hf_hardattn train vit ... Exit code 143 means that SIGTERM stopped
    the run and its state was saved; --resume_from_checkpoint latest continues it.
    """
    from ..errors import unknown

    words = list(context.args)
    if family is None or family in HELP:
        typer.echo(context.get_help())
        return
    if family not in FAMILIES:
        raise unknown("model family", family, FAMILIES, "hf-hardattn train")
    if any(word in HELP for word in words):
        from ..training.flag_help import show

        task = next((after for word, after in zip(words, words[1:], strict=False) if word == "--task"), None)
        typer.echo(show(family, task))
        return
    from ..training.fine_tune import fine_tune

    fine_tune(family, words, ("train", family))
