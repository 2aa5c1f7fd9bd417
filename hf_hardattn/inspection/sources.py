"""Read the inputs that a user names: a text, an image, a folder of images, or a column of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HardAttentionError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FILES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_inputs(given: str, column: str | None = None, limit: int = 8) -> list[Any]:
    """Return PIL images or texts.

    Args:
        given: path of an image, of a folder of images, of a csv, tsv, json, jsonl or parquet file, or of a data set saved by
            ``save_to_disk``; anything else is the text itself. column: of the file or data set; if it holds paths of images, relative
            to the folder of the file, the images are read. limit: largest number of inputs.

    Raises:
        HardAttentionError: a file of another kind, an empty folder, a missing column.
    """
    path = Path(given)
    if column is not None:
        rows = read_table(given)
        if column not in rows.column_names:
            raise HardAttentionError(
                f"no column {column!r} in {given}; it has: {', '.join(rows.column_names)}. Name another with --column."
            )
        return [_value(rows[i][column], path.parent) for i in range(min(limit, len(rows)))]
    if len(given) > 250 or not path.exists():
        if path.suffix.lower() in {*IMAGES, *FILES} and not any(character.isspace() for character in given):
            raise HardAttentionError(
                f"{given} does not exist; an input is a file, a folder, or the text itself. Check the path."
            )
        return [given]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
        if not files:
            raise HardAttentionError(
                f"{given} holds no image ({', '.join(IMAGES)}); name a folder of images, or --column of a data set."
            )
        return [_image(file) for file in files[:limit]]
    if path.suffix.lower() in IMAGES:
        return [_image(path)]
    raise HardAttentionError(
        f"{given} is a file of type {path.suffix!r}; an image is {', '.join(IMAGES)}, and a table ({', '.join(FILES)}) needs --column."
    )


def read_table(given: str) -> Any:
    """Load a file, a folder of images or a saved data set as a ``datasets.Dataset``."""
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(given)
    if path.is_dir() and (path / "state.json").is_file():
        return load_from_disk(given)
    if path.is_dir():
        return load_dataset("imagefolder", data_dir=given, split="train")
    if path.suffix in FILES:
        options: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
        found: Dataset = load_dataset(FILES[path.suffix], data_files=given, split="train", **options)
        return found
    raise HardAttentionError(
        f"{given} is not a data set; use a {', '.join(FILES)} file or a folder saved by save_to_disk."
    )


def _value(value: Any, folder: Path) -> Any:
    """Return a cell of a table; if it is the path of an image, return the image."""
    names_image = isinstance(value, str) and value.lower().endswith(IMAGES) and (folder / value).is_file()
    return _image(folder / value) if names_image else value


def _image(path: Path) -> Any:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        found = ImageOps.exif_transpose(image).copy()  # as pipelines and data sets read it
    found.filename = str(path)  # type: ignore[attr-defined]  # shown in reports
    return found
