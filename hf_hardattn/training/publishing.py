"""Save a trained model, and upload it on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from ..errors import HardAttentionError
from .arguments import ScriptArguments
from .checkpoints import written_in_one_piece
from .results import write_json

logger = get_logger(__name__)


def save_model(accelerator: Accelerator, model: nn.Module, processor: Any, output_dir: str) -> None:
    """Save the whole model (or its adapter with the hard attention configuration) and its processor. If the process is killed meanwhile,
    the earlier files are unchanged.

    Raises:
        HardAttentionError: the disk is full.
    """
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)  # called in every process: under FSDP each holds a shard
    inner = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        with written_in_one_piece(Path(output_dir), "the model") as folder:
            inner.save_pretrained(folder, state_dict=state)
            processor.save_pretrained(folder)
        logger.info("saved to %s", Path(output_dir).resolve())
    accelerator.wait_for_everyone()


def push(args: ScriptArguments) -> None:
    """Write the card and upload ``output_dir``, without its checkpoints, in one commit; report who can see it.

    Raises:
        HardAttentionError: the repository exists with the other visibility, the user may not write to it, or the upload was
            interrupted. The model is in ``output_dir`` in any case.
    """
    from ..hub.card import SOURCE, write_card
    from ..hub.pushing import push as push_folder
    from ..hub.run_card import source_of_run

    folder, repository = Path(args.output_dir), str(args.hub_model_id)
    try:
        if not (folder / SOURCE).is_file():  # a source that a user completed is kept; its numbers are read again
            write_json(folder / SOURCE, source_of_run(folder, repository))
        write_card(folder / SOURCE)
    except HardAttentionError as error:  # a run without evaluation: upload its model without a card
        logger.warning("no card: %s", error)
    logger.info("uploading to %s (%s)", repository, "private" if args.hub_private_repo else "PUBLIC")
    plan = push_folder(folder, repository, dry_run=False, public=not args.hub_private_repo, lenient=True)
    logger.info("%s", plan)
