"""``hf-hardattn train``."""

from __future__ import annotations

from typing import Annotated

import typer

# the flags are the training's own, parsed as its scripts parse them; --help after the family is theirs too
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
FAMILIES = ("vit", "t5", "blip", "encoder", "decoder")
HELP = ("--help", "-h")


def command(
    context: typer.Context,
    family: Annotated[str | None, typer.Argument(help="vit, t5, blip, encoder or decoder.")] = None,
) -> None:
    """Fine-tune a ViT, T5, BLIP or a decoder (Llama, Qwen, Mistral, Gemma): 'hf-hardattn train vit --help' lists the flags.

    They come from the command line and from --config FILE.yaml; --task names what is learned. Over several processes:
    accelerate launch -m hf_hardattn train vit ..., or torchrun -m hf_hardattn train vit ... Exit code 143: SIGTERM came and the
    state is saved; --resume_from_checkpoint latest goes on from it.
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
