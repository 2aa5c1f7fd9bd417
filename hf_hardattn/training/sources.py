"""Read training and evaluation data: from the Hub, from a folder of images, or from csv and json files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset

from ..errors import HardAttentionError, unknown
from .arguments import ScriptArguments

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def load_splits(args: ScriptArguments) -> tuple[Dataset | None, Dataset | None]:
    """Load the training and the evaluation data that the flags name, each None when they name none."""
    with PartialState().local_main_process_first():
        train, validation = _load(args)
    if validation is None and train is not None and args.validation_fraction:
        parts = train.train_test_split(args.validation_fraction, seed=args.seed)
        train, validation = parts["train"], parts["test"]
    return _first(train, args.max_train_samples), _first(validation, args.max_eval_samples)


def _load(args: ScriptArguments) -> tuple[Dataset | None, Dataset | None]:
    ways = {
        "--dataset_name": [args.dataset_name],
        "--train_dir or --validation_dir": [args.train_dir, args.validation_dir],
        "--train_file or --validation_file": [args.train_file, args.validation_file],
    }
    named = [way for way, values in ways.items() if any(values)]
    if len(named) != 1:
        found = " and ".join(named) if named else "none"
        raise HardAttentionError(f"the data comes from {found}; name exactly one source: {', '.join(ways)}.")
    if args.dataset_name:
        found = load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
        if args.train_split not in found:
            raise unknown("split", args.train_split, found, args.dataset_name)
        return found[args.train_split], found.get(args.validation_split)
    if args.train_dir or args.validation_dir:
        folders = _existing({"train": args.train_dir, "validation": args.validation_dir}, Path.is_dir, "folder")
        found = load_dataset(
            "imagefolder", data_files={k: f"{v}/**" for k, v in folders.items()}, cache_dir=args.cache_dir
        )
        return found.get("train"), found.get("validation")
    files = _existing({"train": args.train_file, "validation": args.validation_file}, Path.is_file, "file")
    found = DatasetDict({split: _read_file(path, args) for split, path in files.items()})
    return found.get("train"), found.get("validation")


def _existing(paths: dict[str, str | None], test: Callable[[Path], bool], what: str) -> dict[str, Path]:
    given = {split: Path(path).expanduser().resolve() for split, path in paths.items() if path}
    for path in given.values():
        if not test(path):
            raise HardAttentionError(
                f"{path} is no {what}; --*_dir takes folders, --*_file takes csv, tsv, json or jsonl."
            )
    return given


def _read_file(path: Path, args: ScriptArguments) -> Dataset:
    if path.suffix not in FORMATS:
        raise unknown("data format", path.suffix, FORMATS, str(path))
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", cache_dir=args.cache_dir, **options)


def _first(data: Dataset | None, count: int | None) -> Dataset | None:
    return data if data is None or count is None else data.select(range(min(count, len(data))))


def column(data: Dataset | None, wanted: str | None, usual: tuple[str, ...], flag: str) -> str:
    """The name of a column: ``wanted``, or the first of ``usual`` that exists.

    Raises:
        HardAttentionError: no such column; the message lists the columns.
    """
    names = [] if data is None else data.column_names
    for name in (wanted,) if wanted else usual:
        if name in names:
            return name
    sought = " or ".join(map(repr, (wanted,) if wanted else usual))
    raise HardAttentionError(
        f"no column {sought} in the data; it has: {', '.join(map(repr, names))}. Name it with {flag}."
    )
