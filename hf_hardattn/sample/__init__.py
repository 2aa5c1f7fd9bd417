"""A small trained model and two images inside the package, for trying the library without a download.

``hf_hardattn.load("sample")`` loads it: a ViT of three layers that reads one handwritten digit among fragments of others from 9 of 64
patches. It is the hard model that ``hf-hardattn demo`` trains. ``results/sample.json`` in the repository records its training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "sample"


def folder() -> Path:
    """Return the folder of the model's files."""
    return Path(__file__).parent / "model"


def image_paths() -> list[Path]:
    """Return the paths of the images; each file name contains the digit in the image."""
    return sorted((Path(__file__).parent / "images").glob("*.png"))


def images() -> list[Any]:
    """Return the images as ``PIL.Image``, RGB, 64 pixels per side.

    Raises:
        ImportError: Pillow is not installed; the message names the extra that installs it.
    """
    from ..errors import missing_extra

    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "vision", "the images of the sample model") from error
    return [Image.open(path).copy() for path in image_paths()]
