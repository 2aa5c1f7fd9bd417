"""Fashion-MNIST from its four files, nothing downloaded."""

from __future__ import annotations

import gzip
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import HardAttentionError
from .cluttered import Bank

FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts them
VARIABLE = "FASHION_MNIST"
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PREFIXES = {"train": "train", "test": "t10k"}


@cache
def fashion_bank(split: str, folder: str | None = None) -> Bank:
    """Read a split: 60,000 or 10,000 grey images of 28x28 pixels, 10 classes.

    Args:
        split: ``"train"`` or ``"test"``.
        folder: of ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``; the environment variable ``FASHION_MNIST``, or Debian's
            place, by default.

    Raises:
        HardAttentionError: the files are not there.
    """
    place = Path(folder or os.environ.get(VARIABLE) or FOLDER)
    images, labels = (place / f"{PREFIXES[split]}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1"))
    for path in (images, labels):
        if not path.is_file():
            raise HardAttentionError(
                f"Fashion-MNIST is not at {path}; the task 'cluttered_fashion' reads its four idx.gz files. "
                f"Install them with: apt-get install dataset-fashion-mnist, or name their folder in ${VARIABLE}."
            )
    return Bank(_read(images, 16).view(1, -1, 28, 28), _read(labels, 8).long(), white=255.0)


def _read(path: Path, header: int) -> Tensor:
    """The bytes of an idx file behind its header, uint8."""
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8, offset=header)
