"""Save a trained model, and upload it when asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from ..errors import HardAttentionError
from .arguments import ScriptArguments

logger = get_logger(__name__)


def save_model(accelerator: Accelerator, model: nn.Module, processor: Any, output_dir: str) -> None:
    """Save the model whole (or its adapter, with the hard configuration beside it) and its processor."""
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)  # every process takes part: under FSDP each holds a piece
    inner = accelerator.unwrap_model(model)
    inner.save_pretrained(output_dir, is_main_process=accelerator.is_main_process, state_dict=state)
    if accelerator.is_main_process:
        if hasattr(inner, "peft_config"):
            inner.get_base_model().config.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
        logger.info("saved to %s", Path(output_dir).resolve())
    accelerator.wait_for_everyone()


def push(args: ScriptArguments) -> None:
    """Upload ``output_dir`` without its checkpoints; say who can see it.

    Raises:
        HardAttentionError: the repository exists and is public, but a private one was asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(str(args.hub_model_id), private=args.hub_private_repo, exist_ok=True).repo_id
    private = api.repo_info(repository).private
    if args.hub_private_repo and not private:
        raise HardAttentionError(
            f"{repository} exists and is public; the upload was to be private. Pass --no_hub_private_repo, or another --hub_model_id. "
            f"The model is in {args.output_dir}."
        )
    logger.info("uploading to %s (%s)", repository, "private" if private else "PUBLIC")
    api.upload_folder(repo_id=repository, folder_path=args.output_dir, ignore_patterns=["checkpoints/*"])
