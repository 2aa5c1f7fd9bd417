"""Checkpoints of a run. They are written atomically, only the newest are kept, and a run resumes at the exact optimizer step."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError

from ..errors import HardAttentionError
from .pickles import check_pickles
from .results import read_json, write_json

logger = get_logger(__name__)
MANIFEST = "files.json"  # name, size and sha256 of every file; it is written last
# exceptions of reading a damaged file and of writing to a full disk: pickle, zip and safetensors each have their own
FILE_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, UnpicklingError, SafetensorError)


@dataclass
class RunState:
    """Progress of a run; saved with each checkpoint.

    Attributes:
        layout: values that the data order depends on; they must be the same in a resumed run.
        step: optimizer steps done. loss, losses: sum and number of micro-batch losses of this process since the last log row.
        seconds: training time over all resumes.
        best: best value of the metric that the model is chosen by; best_step: its step; waited: evaluations since then.
    """

    layout: dict[str, int]
    step: int = 0
    loss: Any = 0.0
    losses: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "loss": float(self.loss)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.pop("layout").items():
            if self.layout[name] != value:
                raise HardAttentionError(
                    f"{name}={self.layout[name]} but the checkpoint was made with {value}; the order of the data depends on it, "
                    "and a resumed run must keep that order. Resume with the old value, or start a new run from the saved model."
                )
        for name, value in state.items():
            setattr(self, name, value)


def save(
    accelerator: Accelerator, output_dir: str, run: RunState, limit: int | None = None, best: bool = False
) -> None:
    """Save the whole state under ``output_dir/checkpoints``; a crash while saving leaves the last complete checkpoint in place.

    Args:
        limit: number of newest checkpoints to keep; None for all. best: save it as the best checkpoint, in addition to those.

    Raises:
        HardAttentionError: the checkpoint cannot be written; existing checkpoints are unchanged.
    """
    folder = Path(output_dir) / "checkpoints"
    name = f"{'best' if best else 'step'}_{run.step:08d}"
    final, partial = folder / name, folder / f"partial_{name}"
    run.loss = accelerator.reduce(torch.as_tensor(run.loss, device=accelerator.device), "mean").item()
    with _told_when_full(output_dir, f"the checkpoint of step {run.step}"):
        if accelerator.is_main_process:
            for stale in folder.glob("partial_*"):
                shutil.rmtree(stale)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(partial)
            if final.exists():  # the run repeated this step; a rename does not replace a non-empty folder
                final.rename(folder / f"partial_old_{name}")
            partial.rename(final)
            shutil.rmtree(folder / f"partial_old_{name}", ignore_errors=True)
    if accelerator.is_main_process:
        if limit is not None and not best:
            for old in complete(output_dir)[: -max(limit, 1)]:
                _forget(old)
        if not best:  # older best checkpoints belong to older checkpoints, which are removed or superseded now
            for old in folder.glob("best_*"):
                if old.name != f"best_{run.best_step or 0:08d}":
                    _forget(old)
    accelerator.wait_for_everyone()


def complete(output_dir: str) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted((Path(output_dir) / "checkpoints").glob("step_*"))


def resume(accelerator: Accelerator, output_dir: str, wanted: str, trusted: bool = False) -> bool:
    """Load the checkpoint ``wanted``: a directory, or ``latest``. Return False if there is no latest checkpoint yet.

    ``latest`` skips damaged checkpoints, with a warning for each.

    Args:
        trusted: also load pickles that can run code.

    Raises:
        HardAttentionError: the directory does not exist, is damaged, or comes from another run.
    """
    found = complete(output_dir)
    if wanted == "latest":
        path = None
        while found and path is None:
            wrong = damage(found[-1])
            if wrong is None:
                path = found[-1]
            else:
                logger.warning("skipping %s: %s", found.pop(), wrong)
        if path is None:
            logger.warning("no checkpoint in %s yet: starting at step 0", output_dir)
            return False
    else:
        path = Path(wanted).expanduser().resolve()
        others = ", ".join(str(f) for f in found if f.resolve() != path) or "none"
        if not path.is_dir():
            raise HardAttentionError(
                f"{path} is not a checkpoint directory; available: {others}. Use 'latest' for the newest."
            )
        wrong = damage(path)
        if wrong is not None:
            raise HardAttentionError(
                f"the checkpoint {path} is damaged: {wrong}. Resume from another one; available: {others}."
            )
    load(accelerator, path, trusted)
    logger.info("resumed from %s", path)
    return True


def load(accelerator: Accelerator, path: Path, trusted: bool = False) -> None:
    """Load the state at ``path``.

    Args:
        trusted: also load pickles that can run code.

    Raises:
        HardAttentionError: a file is missing or unreadable, could run code, or belongs to another model.
    """
    check_pickles(path, trusted)
    try:
        accelerator.load_state(str(path))
    except HardAttentionError:
        raise
    except FILE_ERRORS as error:
        raise HardAttentionError(
            f"the checkpoint {path} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:200]}); it is damaged, or was "
            "made with another model, optimizer or distribution strategy. Resume with its original flags, or from another one."
        ) from error
    accelerator.step = 0  # start at the first micro-batch of an optimizer step, whatever the accumulation was


def best(accelerator: Accelerator, output_dir: str, run: RunState, trusted: bool = False) -> None:
    """Replace the last state by the best checkpoint."""
    step = run.step, run.seconds
    load(accelerator, Path(output_dir) / "checkpoints" / f"best_{run.best_step:08d}", trusted)
    run.step, run.seconds = step


def check_writable(output_dir: str) -> None:
    """Create the folder of a run and test that it is writable, before hours of training depend on it.

    Raises:
        HardAttentionError: the folder cannot be created or written to.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise HardAttentionError(
            f"--output_dir {output_dir!r} is not writable ({type(error).__name__}: {error}); the run saves its model and records "
            "there. Use another folder."
        ) from error


@contextmanager
def written_in_one_piece(folder: Path, what: str) -> Iterator[Path]:
    """Write files to a hidden folder and move them to ``folder`` at the end of the block, the config last, because it marks a model.

    If the process is killed inside the block, ``folder`` is unchanged.

    Raises:
        HardAttentionError: the files cannot be written.
    """
    partial = folder / ".partial"
    with _told_when_full(str(folder), what):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            _flush(path)
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
        partial.rmdir()


def _seal(folder: Path) -> None:
    """Flush the files to disk and write their manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _flush(path)
    write_json(
        folder / MANIFEST,
        {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files},
    )


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """Describe the damage of a checkpoint; None if it is intact."""
    try:
        files = read_json(folder / MANIFEST)
    except (OSError, ValueError, RecursionError):
        return f"{MANIFEST}, which is written last, is missing or unreadable"
    if not isinstance(files, dict):
        return f"{MANIFEST} holds a {type(files).__name__} instead of the names and sizes of files"
    for name, noted in files.items():
        if isinstance(noted, int):  # format of an earlier version
            noted = {"bytes": noted}
        size = noted.get("bytes") if isinstance(noted, dict) else None
        if not isinstance(size, int):
            return f"{MANIFEST} has no size for {name}"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, but {size:,} were written"
        if noted.get("sha256", "") and noted["sha256"] != _digest(path):
            return f"{name} has changed since it was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget(folder: Path) -> None:
    """Remove a checkpoint; if the process is killed meanwhile, the remains do not look like a complete one."""
    gone = folder.with_name(f"partial_{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


@contextmanager
def _told_when_full(output_dir: str, what: str) -> Iterator[None]:
    """Convert the errors of a full or failing disk to one that says what to do; other errors pass unchanged."""
    try:
        yield
    except FILE_ERRORS as error:
        if isinstance(error, HardAttentionError) or not _is_of_the_disk(error, output_dir):
            raise
        found = complete(output_dir)
        kept = f"The last complete checkpoint is {found[-1]}." if found else "There is no complete checkpoint yet."
        raise HardAttentionError(
            f"{what} could not be written to {Path(output_dir).resolve()} ({str(error).splitlines()[0][:200]}); the disk or the quota is "
            f"full, or the folder is not writable. {kept} Free some space (--checkpoints_total_limit 1 keeps one), then start again "
            "with --resume_from_checkpoint latest."
        ) from error


def _is_of_the_disk(error: BaseException, output_dir: str) -> bool:
    """Whether ``error`` came from writing, by its number or by the wording of PyTorch's and safetensors' writers."""
    if isinstance(error, OSError):
        return error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EIO,
            errno.EFBIG,
        )
    words = ("No space left", "os error 28", "os error 122", "PytorchStreamWriter", "unexpected pos", "enforce fail")
    return any(word in str(error) for word in words)
