"""A small trained model and two images inside the package, to try the library without a download.

``hf_hardattn.load("sample")`` loads it: a ViT of three layers that reads one handwritten digit among fragments of others from 9 of 64
patches, the hard model that ``hf-hardattn demo`` trains. ``results/sample.json`` in the repository records its training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "sample"


def folder() -> Path:
    """The folder with the model's files."""
    return Path(__file__).parent / "model"


def image_paths() -> list[Path]:
    """The images, whose file names say which digit each shows."""
    return sorted((Path(__file__).parent / "images").glob("*.png"))


def images() -> list[Any]:
    """The images as ``PIL.Image``, RGB, 64 pixels a side.

    Raises:
        ImportError: Pillow is not installed; the message names the extra that brings it.
    """
    from ..errors import missing_extra

    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "vision", "the images of the sample model") from error
    return [Image.open(path).copy() for path in image_paths()]
