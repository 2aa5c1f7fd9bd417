"""Read training and evaluation data from the Hub, from a folder of images, or from csv and json files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..errors import HardAttentionError, unknown
from .arguments import ScriptArguments

logger = logging.getLogger(__name__)
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def load_splits(args: ScriptArguments) -> tuple[Any, Any]:
    """Load the training and the evaluation data that the flags name; each is None if they do not name it. With ``--streaming`` the
    training data is an ``IterableDataset``."""
    if args.streaming and args.validation_fraction:
        raise HardAttentionError(
            f"validation_fraction={args.validation_fraction} of a stream cannot be held out; its number of rows is unknown. "
            "Specify evaluation data with --validation_file, --validation_dir or --validation_split."
        )
    with PartialState().local_main_process_first():
        train, validation = _load(args)
    if validation is None and train is not None and args.validation_fraction:
        parts = train.train_test_split(args.validation_fraction, seed=args.seed)
        train, validation = parts["train"], parts["test"]
    train, validation = _first(train, args.max_train_samples), _first(validation, args.max_eval_samples)
    if isinstance(train, IterableDataset):
        train = train.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
    return train, validation


def _load(args: ScriptArguments) -> tuple[Any, Any]:
    ways = {
        "--dataset_name": [args.dataset_name],
        "--train_dir or --validation_dir": [args.train_dir, args.validation_dir],
        "--train_file or --validation_file": [args.train_file, args.validation_file],
    }
    named = [way for way, values in ways.items() if any(values)]
    if len(named) != 1:
        found = " and ".join(named) if named else "none"
        raise HardAttentionError(f"data sources given: {found}; use exactly one of: {', '.join(ways)}.")
    if args.dataset_name:
        where = (args.dataset_name, args.dataset_config_name)
        splits = get_dataset_split_names(*where) if args.streaming else None
        found = splits or load_dataset(*where, cache_dir=args.cache_dir)
        if args.train_split not in found:
            raise unknown("split", args.train_split, found, args.dataset_name)
        if not splits:
            return found[args.train_split], found.get(args.validation_split)
        train = _stream(*where, split=args.train_split)
        validation = args.validation_split if args.validation_split in splits else None
        return train, validation and load_dataset(*where, split=validation, cache_dir=args.cache_dir)
    if args.train_dir or args.validation_dir:
        folders = _existing({"train": args.train_dir, "validation": args.validation_dir}, Path.is_dir, "folder")
        folders = _split_folders(folders)
        files = {split: (args.folder_format, {"data_files": f"{folder}/**"}) for split, folder in folders.items()}
    else:
        paths = _existing({"train": args.train_file, "validation": args.validation_file}, Path.is_file, "file")
        files = {split: _format(path) for split, path in paths.items()}
    data = {
        split: _stream(kind, split="train", **options)
        if args.streaming and split == "train"
        else _whole(kind, options, args)
        for split, (kind, options) in files.items()
    }
    return data.get("train"), data.get("validation")


def _split_folders(folders: dict[str, Path]) -> dict[str, Path]:
    """Return the folders to read; a named folder that holds only splits is replaced by its splits."""
    found = dict(folders)
    inside = {split: _splits_in(folder) for split, folder in folders.items()}
    if "train" in folders and inside["train"]:
        splits = inside["train"]
        if "train" not in splits:
            raise HardAttentionError(
                f"{folders['train']} holds the splits {', '.join(sorted(p.name for p in splits.values()))} but none to train on; pass the "
                "folder of the training data as --train_dir, and that of the evaluation data as --validation_dir."
            )
        found["train"] = splits["train"]
        held_out = splits.get("validation", splits.get("test"))
        if held_out is not None:
            found.setdefault("validation", held_out)
        logger.info(
            "%s holds splits: training on %s, evaluating on %s",
            folders["train"],
            found["train"],
            found.get("validation"),
        )
    if "validation" in folders and inside["validation"]:
        splits = inside["validation"]
        found["validation"] = splits.get("validation") or splits.get("test") or splits["train"]
        if found["validation"] == found.get("train"):
            raise HardAttentionError(
                f"{folders['validation']} holds no split to evaluate on other than the training split; add a folder validation/ or test/."
            )
    return found


def _splits_in(folder: Path) -> dict[str, Path]:
    """Return the splits of a folder if all its subfolders have names of splits; empty if they are classes.

    Raises:
        HardAttentionError: the folder holds a training split, an evaluation split, and other subfolders.
    """
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = {path: SPLITS[path.name.lower()] for path in subfolders if path.name.lower() in SPLITS}
    splits = set(named.values())
    if named and len(named) == len(subfolders) == len(splits):
        return {split: path for path, split in named.items()}
    if "train" in splits and len(splits) > 1:  # read as classes, evaluation images would be trained on
        names = ", ".join(path.name for path in subfolders)
        raise HardAttentionError(
            f"{folder} holds {names}: splits and other folders. Pass the folders themselves: --train_dir {folder}/train "
            f"--validation_dir {folder}/..."
        )
    return {}


def _whole(kind: str, options: dict[str, Any], args: ScriptArguments) -> Any:
    """Return all rows of a file or folder.

    Raises:
        HardAttentionError: there are no rows, or the file cannot be read as its kind.
    """
    path = options["data_files"].removesuffix("/**")
    try:
        return load_dataset(kind, split="train", cache_dir=args.cache_dir, **options)
    except (DatasetGenerationError, FileNotFoundError, ValueError, StopIteration) as error:
        cause = error.__cause__ or error
        empty = (
            isinstance(error, (FileNotFoundError, StopIteration))
            or "no data" in str(error)
            or "No columns" in str(cause)
        )
        if empty:
            raise HardAttentionError(
                f"{path} holds no rows; training and evaluation need at least one. Check the file or folder, or use another."
            ) from error
        what = " ".join(str(cause).split())
        raise HardAttentionError(
            f"{path} cannot be read as {kind} ({type(cause).__name__}: {what}); all rows need the same columns, and each column one type. "
            "Fix the file, or remove the row."
        ) from error


def _stream(*where: Any, **options: Any) -> IterableDataset:
    """Return a stream with known columns, from the format or else from its first rows."""
    data = load_dataset(*where, streaming=True, **options)
    return data if data.features else data.cast(Dataset.from_list(list(data.take(100))).features)


def _existing(paths: dict[str, str | None], test: Callable[[Path], bool], what: str) -> dict[str, Path]:
    given = {split: Path(path).expanduser().resolve() for split, path in paths.items() if path}
    for path in given.values():
        if not test(path):
            raise HardAttentionError(
                f"{path} is not a {what}; --*_dir takes folders, --*_file takes csv, tsv, json or jsonl."
            )
    return given


def _format(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the reader of a file and its options."""
    if path.suffix not in FORMATS:
        raise unknown("data format", path.suffix, FORMATS, str(path))
    return FORMATS[path.suffix], {"data_files": str(path), **({"sep": "\t"} if path.suffix == ".tsv" else {})}


def _first(data: Any, count: int | None) -> Any:
    if data is None or count is None:
        return data
    return data.select(range(min(count, len(data)))) if isinstance(data, Dataset) else data.take(count)


def column(data: Any, wanted: str | None, usual: tuple[str, ...], flag: str) -> str:
    """Return the name of a column: ``wanted``, or the first of ``usual`` that exists.

    Raises:
        HardAttentionError: no such column; the message lists the columns.
    """
    names = [] if data is None else data.column_names
    for name in (wanted,) if wanted else usual:
        if name in names:
            return name
    sought = " or ".join(map(repr, (wanted,) if wanted else usual))
    raise HardAttentionError(
        f"no column {sought} in the data; it has: {', '.join(map(repr, names))}. Specify it with {flag}."
    )
