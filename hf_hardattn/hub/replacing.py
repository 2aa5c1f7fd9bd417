"""Replace a folder atomically: readers, also after an interruption, see either the old files or the new ones, never a mixture."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import HardAttentionError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced(folder: Path, what: str, drop: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a new folder to write to, which replaces ``folder`` when the block ends without an error.

    Files of ``folder`` that were not rewritten are kept, except those that match a glob in ``drop``.

    Args:
        what: description of the content, for errors.

    Raises:
        HardAttentionError: ``folder`` is a file, the disk is full, or the path is not writable; what was there is unchanged.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise HardAttentionError(
            f"{folder} is a file; {what} is written to a folder, and no file is replaced by one. Name another folder, or remove the file."
        )
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
        if (folder / "README.md").is_file():  # PEFT updates an existing card
            shutil.copy2(folder / "README.md", partial)
        yield partial
        for path in partial.rglob("*"):
            _flush(path)
        if not folder.exists():
            partial.rename(folder)
        elif _is_in_use(folder):
            _move_files(partial, folder, drop)
        else:
            _link_rest(folder, partial, drop)
            shutil.copymode(folder, partial)
            _exchange(partial, folder)
    except (OSError, SafetensorError) as error:
        state = "its contents are unchanged" if folder.exists() else "nothing was written"
        raise HardAttentionError(
            f"{what} could not be written to {folder} ({type(error).__name__}: {str(error).splitlines()[0][:200]}); {state}. Free "
            "some space, or use a writable folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, atomically if the system supports it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            if not libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE):
                return
            if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _link_rest(old: Path, new: Path, drop: tuple[str, ...]) -> None:
    """Add the files that were not rewritten to the new folder, as links if the file system supports them."""
    for path in sorted(old.rglob("*")):
        place = new / path.relative_to(old)
        if place.is_symlink() or place.exists() or (path.parent == old and any(map(path.match, drop))):
            continue
        if path.is_dir() and not path.is_symlink():
            place.mkdir()
            shutil.copymode(path, place)
            continue
        try:
            os.link(path, place, follow_symlinks=False)
        except OSError:
            shutil.copy2(path, place, follow_symlinks=False)


def _move_files(new: Path, old: Path, drop: tuple[str, ...]) -> None:
    """Move the files one by one if the folder itself must stay; configurations come last, because they mark a complete model."""
    written = sorted(new.iterdir(), key=lambda path: path.suffix == ".json")
    for path in written:
        if path.is_dir() and (old / path.name).is_dir():
            shutil.rmtree(old / path.name)  # os.replace only replaces an empty folder
        os.replace(path, old / path.name)
    names = {path.name for path in written}
    for path in old.iterdir():
        if path.name not in names and any(map(path.match, drop)):
            path.unlink()


def _is_in_use(folder: Path) -> bool:
    """Whether the folder is the working directory of this process or a parent of it, or a mount point."""
    return Path.cwd().is_relative_to(folder) or os.path.ismount(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left beside ``folder``, if it is a day old: another process may still be writing newer ones."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        if path.name.endswith(f"-{os.getpid()}") or time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
