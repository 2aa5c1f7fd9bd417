"""Replace a folder in one step: whoever looks at it, or stops the program, finds the old files or the new ones, never some of each."""

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
    """Give a new folder to write to; it takes the place of ``folder`` when the block ends without an error.

    Files of ``folder`` that were not written anew stay, except those that match a glob in ``drop``.

    Args:
        what: is written, for errors.

    Raises:
        HardAttentionError: the disk is full, or the place is not writable; ``folder`` is as it was.
    """
    folder = Path(os.path.realpath(folder))
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
        if (folder / "README.md").is_file():  # PEFT writes into the card that it finds
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
        state = "what was there is unchanged" if folder.exists() else "nothing was written"
        raise HardAttentionError(
            f"{what} could not be written to {folder} ({type(error).__name__}: {str(error).splitlines()[0][:200]}); {state}. Make "
            "room, or name a folder that may be written to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; in one step where the system can."""
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
    """Put what was not written anew into the new folder too, without copying it where the file system has links."""
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
    """Where the folder itself must stay: move the files one by one, configurations last, since they make a model of the others."""
    written = sorted(new.iterdir(), key=lambda path: path.suffix == ".json")
    for path in written:
        if path.is_dir() and (old / path.name).is_dir():
            shutil.rmtree(old / path.name)  # a folder takes the place of an empty one only
        os.replace(path, old / path.name)
    names = {path.name for path in written}
    for path in old.iterdir():
        if path.name not in names and any(map(path.match, drop)):
            path.unlink()


def _is_in_use(folder: Path) -> bool:
    """Whether the folder is somebody's place to stand: of this process or one above it, or where a disk is mounted."""
    return Path.cwd().is_relative_to(folder) or os.path.ismount(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left beside ``folder``; after a day, as another process may be writing there now."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        if path.name.endswith(f"-{os.getpid()}") or time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
