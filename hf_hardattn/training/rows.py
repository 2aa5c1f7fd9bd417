"""Read a row of the user's data or report what is wrong with it; check every row before the training starts."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, Image

from ..errors import HardAttentionError, missing_extra


def as_images(data: Any, name: str, file: str | None) -> Any:
    """Convert the column ``name`` to images that are read on demand; paths in a csv or json file are relative to that file."""
    if not isinstance(data.features[name], Image):
        folder = Path(file).expanduser().resolve().parent if file else Path.cwd()

        def whole(path: str | None) -> str | None:
            return None if path is None else str(folder / path)

        if isinstance(data, Dataset):
            data = data.remove_columns(name).add_column(name, [whole(path) for path in data[name]])
        else:  # the cells of a stream remain paths
            return data.map(lambda row: {name: whole(row[name])}, features=data.features)
    return data.cast_column(name, Image(decode=False))


def read_image(value: Any, mode: str = "RGB") -> Any:
    """Return the PIL image of an undecoded cell.

    Raises:
        HardAttentionError: the image cannot be read.
    """
    try:
        return _open(value).convert(mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(value, error) from error


def image_size(value: Any) -> tuple[int, int]:
    """Return width and height of an undecoded cell; check as much as possible without decoding the pixels.

    Raises:
        HardAttentionError: the image cannot be read.
    """
    try:
        image = _open(value)
        image.verify()
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(value, error) from error
    size: tuple[int, int] = image.size
    return size


def _open(value: Any) -> Any:
    try:
        from PIL import Image as Pillow
    except ImportError as error:
        raise missing_extra("pillow", "vision", "a column of images") from error
    if value is None:
        raise ValueError("the cell is empty")
    if isinstance(value, str):
        return Pillow.open(value)
    return Pillow.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])


def _unreadable(value: Any, error: Exception) -> HardAttentionError:
    path = value["path"] if isinstance(value, dict) else value
    name = f"the image {path}" if path else "the image"
    return HardAttentionError(
        f"{name} cannot be read ({type(error).__name__}: {error}); every row needs a complete image file that Pillow can read. "
        "Fix the file, or remove the row."
    )


def text(row: dict[str, Any], name: str) -> str:
    """Return the text in the column ``name`` of ``row``.

    Raises:
        HardAttentionError: the cell is empty or not a text.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise HardAttentionError(
            f"{name}={value!r} is not a text; every row needs one. Fill it in, remove the row, or use another column."
        )
    return value


def class_names(training: Any, label: str) -> dict[str, Any]:
    """Return ``id2label`` and ``label2id`` of the training data. The result is empty without training data, or if a stream does not
    declare its classes; a trained model has its own."""
    feature = None if training is None else training.features[label]
    if isinstance(feature, ClassLabel):
        classes = feature.names
    elif isinstance(training, Dataset):
        found = {value for value in training[label] if value is not None}
        classes = [str(value) for value in sorted(found, key=lambda value: (isinstance(value, str), value))]
    else:
        return {}
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def label_numbers(config: Any) -> dict[str, int]:
    """Return the number of each label of a classifier: ``id2label`` inverted, because ``label2id`` may be that of its base checkpoint."""
    return {str(name): int(number) for number, name in (config.id2label or {}).items()}


def label_number(value: Any, names: ClassLabel | None, label2id: dict[str, int]) -> int:
    """Return the model's number of a label.

    Args:
        names: class names of the column if its cells are numbers. label2id: mapping of the model, see ``label_numbers``.

    Raises:
        HardAttentionError: the model has no such label.
    """
    known = value is not None and (names is None or 0 <= value < len(names.names))
    name = (names.names[value] if names is not None else str(value)) if known else None
    if name not in label2id:
        shown = list(label2id)[:20]
        raise HardAttentionError(
            f"label {value if name is None else name!r} is not one of the model's {len(label2id)} labels; it has: "
            f"{', '.join(map(repr, shown))}{' ...' if len(label2id) > len(shown) else ''}. "
            "Fix the row, or train with data that has all labels."
        )
    return label2id[name]


def check_some(data: Any, split: str) -> None:
    """Raise HardAttentionError for a split without rows."""
    if isinstance(data, Dataset) and len(data) == 0:
        raise HardAttentionError(
            f"the {split} data has no rows; training and evaluation need at least one. Check its file, folder or split, and --max_*_samples."
        )


def check_rows(accelerator: Accelerator, data: Any, split: str, check: Callable[[dict[str, Any]], None]) -> None:
    """Check every row. Each process checks its share, and all raise an error that one finds. A streamed data set is not checked.

    Raises:
        HardAttentionError: ``check`` raised; the message names the row.
    """
    if not isinstance(data, Dataset):
        return
    found: list[tuple[int, str]] = []
    for index in range(accelerator.process_index, len(data), accelerator.num_processes):
        try:
            check(data[index])
        except HardAttentionError as error:
            found.append((index, str(error)))
            break
    found = gather_object(found) if accelerator.num_processes > 1 else found
    if found:
        index, message = min(found)
        raise HardAttentionError(f"row {index} of the {split} data (counted from 0): {message}")


def same_everywhere(accelerator: Accelerator, splits: dict[str, Any]) -> None:
    """Raise unless all processes read the same rows in the same order; images are compared by the name and size of their file.

    Raises:
        HardAttentionError: the data differ; the message names the first row that differs.
    """
    if accelerator.num_processes == 1:
        return
    for split, data in splits.items():
        if not isinstance(data, Dataset):
            continue
        marks = [_mark(row) for row in data]
        digest = hashlib.blake2b("".join(marks).encode(), digest_size=8).hexdigest()
        if len(set(gather_object([digest]))) == 1:
            continue
        mine = gather_object([marks])
        other = next(rank for rank, theirs in enumerate(mine) if theirs != mine[0])
        row = next((i for i, (a, b) in enumerate(zip(mine[0], mine[other], strict=False)) if a != b), None)
        place = (
            f"row {min(map(len, (mine[0], mine[other])))} is in only one of them"
            if row is None
            else f"row {row} is the first to differ"
        )
        raise HardAttentionError(
            f"processes 0 and {other} read different {split} data ({len(mine[0])} and {len(mine[other])} rows; {place}, counted from 0); "
            "each must see the same rows in the same order, or examples are lost and repeated. Use the same files and flags on all nodes."
        )


def _mark(row: dict[str, Any]) -> str:
    plain = {
        name: (Path(cell["path"] or "").name, len(cell["bytes"] or b""))
        if isinstance(cell, dict) and "bytes" in cell
        else cell
        for name, cell in row.items()
    }
    return hashlib.blake2b(repr(plain).encode(), digest_size=8).hexdigest()
