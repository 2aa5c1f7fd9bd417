"""Safe resume: the pickles in a checkpoint are checked before they are loaded, so that they cannot run code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import HardAttentionError

# Files that libraries load without a check: Accelerate, PyTorch's distributed checkpoints, DeepSpeed.
_UNCHECKED = ("custom_checkpoint_*.pkl", ".metadata", "*.pt")
_ALLOWED = {
    "collections": ("OrderedDict", "defaultdict"),
    "builtins": ("set", "frozenset", "bytearray", "complex", "slice", "range"),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "Path"),
    "torch": ("Size", "device", "dtype", "layout"),
    "torch.serialization": ("_get_layout",),
}


def check_pickles(folder: Path, trusted: bool = False) -> None:
    """Raise for a checkpoint with a pickle that needs more than plain data.

    Args:
        trusted: whether the user trusts the checkpoint; then nothing is checked.

    Raises:
        HardAttentionError: a pickle could run code; the message names the file and what it would run.
    """
    if trusted:
        return
    for path in sorted(path for pattern in _UNCHECKED for path in folder.rglob(pattern) if path.is_file()):
        try:
            _read(path)
        except Exception as error:  # noqa: BLE001 - damaged files make pickle raise anything
            text = " ".join(str(error).split())[:200]
            raise HardAttentionError(
                f"{path.relative_to(folder)} of the checkpoint {folder} is damaged, or is a pickle that can run code on this machine "
                f"({type(error).__name__}: {text}). If you made this checkpoint yourself and it is complete, add --trust_checkpoint; "
                "otherwise resume from another one."
            ) from error


def _read(path: Path) -> None:
    """Read a file; only plain data, tensors and classes of PyTorch's checkpoints are allowed in it."""
    if zipfile.is_zipfile(path):
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    else:
        with path.open("rb") as file:
            _PlainUnpickler(file).load()


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that imports only the names in ``_ALLOWED`` and those of PyTorch's distributed checkpoints."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _ALLOWED.get(module, ())
        if module == "torch" and isinstance(
            getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format)
        ):
            known = True
        if known or (module.startswith("torch.distributed.checkpoint.") and "." not in name):
            found = super().find_class(module, name)
            if known or (isinstance(found, type) and found.__module__.startswith("torch.distributed.checkpoint.")):
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it holds tensors outside an archive")
