"""Checkpoints of a run: complete or absent, the newest kept, resumed at the exact optimizer step."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from ..errors import HardAttentionError

logger = get_logger(__name__)


@dataclass
class RunState:
    """Where a run stands; saved with each checkpoint.

    Attributes:
        step: optimizer steps done. loss, losses: sum and number of micro-batch losses since the last log row.
        seconds: of training, over all resumes.
        layout: what the data order depends on; a resumed run must agree.
    """

    layout: dict[str, int]
    step: int = 0
    loss: float = 0.0
    losses: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.pop("layout").items():
            if self.layout[name] != value:
                raise HardAttentionError(
                    f"{name}={self.layout[name]} but the checkpoint was made with {value}; a resumed run sees the data in the same "
                    "order, which depends on it. Resume with the old value, or start a new run from the saved model."
                )
        for name, value in state.items():
            setattr(self, name, value)


def save(accelerator: Accelerator, output_dir: str, step: int, limit: int | None) -> None:
    """Save the whole state under ``output_dir/checkpoints``; a crash on the way leaves the last complete one in place."""
    folder = Path(output_dir) / "checkpoints"
    final, partial = folder / f"step_{step:08d}", folder / f"partial_{step:08d}"
    if accelerator.is_local_main_process:
        for stale in folder.glob("partial_*"):
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if limit is not None:
            for old in complete(output_dir)[: -max(limit, 1)]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def complete(output_dir: str) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted((Path(output_dir) / "checkpoints").glob("step_*"))


def resume(accelerator: Accelerator, output_dir: str, wanted: str) -> bool:
    """Load the checkpoint ``wanted``: a directory, or ``latest``; False when there is no latest yet."""
    found = complete(output_dir)
    if wanted == "latest" and not found:
        logger.warning("no checkpoint in %s yet: starting at step 0", output_dir)
        return False
    path = found[-1] if wanted == "latest" else Path(wanted).expanduser().resolve()
    if not path.is_dir():
        names = ", ".join(str(f) for f in found) or "none"
        raise HardAttentionError(f"{path} is no checkpoint directory; there are: {names}. 'latest' takes the newest.")
    accelerator.load_state(str(path))
    logger.info("resumed from %s", path)
    return True
