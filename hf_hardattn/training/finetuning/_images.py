"""Shared code of the tasks that read images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor

from ...errors import HardAttentionError
from ..arguments import flag
from ..rows import as_images, image_size, read_image
from ..sources import column
from . import Base, TaskArguments


@dataclass(kw_only=True)
class ImageArguments(TaskArguments):
    """Flags of the tasks that read images."""

    image_column: str | None = flag(None, "Column of images or their paths: image or img by default.")


class ImageTask(Base):
    """Base class of the tasks whose rows hold an image."""

    Arguments = ImageArguments
    processor_class: ClassVar[Any] = AutoImageProcessor
    mode = "RGB"
    first_size: tuple[int, int] | None = None

    def columns(self, data: Dataset) -> None:
        self.image = self.find_image(data)

    def find_image(self, data: Dataset) -> str:
        """Return the name of the image column."""
        return column(data, self.args.image_column, ("image", "img"), "--image_column")

    def prepare(self, data: Dataset, file: str | None) -> Dataset:
        return as_images(data, self.image, file)

    def check_row(self, row: dict[str, Any]) -> None:
        self.check_image(row)

    def check_image(self, row: dict[str, Any]) -> None:
        """Raise HardAttentionError where ``pixels`` would, with as little work as possible."""
        size = image_size(row[self.image])
        if not getattr(self.image_processor, "do_resize", True):
            self.first_size = same_size(size, self.first_size)

    @property
    def image_processor(self) -> Any:
        return getattr(self.processor, "image_processor", self.processor)

    def pixels(self, rows: list[dict[str, Any]]) -> Tensor:
        """Return the pixel values ``[B, C, H, W]`` of the rows' images."""
        images = [read_image(row[self.image], self.mode) for row in rows]
        pixels: Tensor = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return pixels


def same_size(size: tuple[int, int], first: tuple[int, int] | None) -> tuple[int, int]:
    """Return ``size`` if it equals ``first`` or there is no first one.

    Raises:
        HardAttentionError: the sizes differ.
    """
    if first is not None and size != first:
        raise HardAttentionError(
            f"the image is {size[0]}x{size[1]} pixels, but the first is {first[0]}x{first[1]}; a batch has a single size, and this "
            "image processor does not resize. Set do_resize and size in preprocessor_config.json, or resize the files."
        )
    return size
