"""Write the record of a run: ``results.json`` and ``log.jsonl``."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from ..recording import selectors

PACKAGES = ("hf-hardattn", "torch", "transformers", "accelerate", "datasets", "peft", "numpy")


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` atomically: a reader sees the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read a file of ``write_json``."""
    return json.loads(path.read_text(encoding="utf-8"))


def describe_run(argv: list[str] | None) -> dict[str, Any]:
    """Return the versions and the command of this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    program = Path(sys.argv[0])  # record an installed command by its name only; its path depends on the machine
    words = [program.name if program.is_absolute() else str(program), *(sys.argv[1:] if argv is None else argv)]
    return {"command": shlex.join(words), "versions": versions, "platform": platform.platform()}


def describe_model(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Return the number of parameters of a model, and the sha256 of each weight file that the run saved in ``folder``."""
    chosen = selectors(model).values()
    return {
        "parameters": {"all": _count(model), "selectors": sum(map(_count, chosen))},
        "hashes": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
    }


def _count(module: nn.Module) -> int:
    # DeepSpeed's stage 3 leaves empty parameters in place, which store their size as ds_numel
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def sha256(path: Path) -> str:
    """Return the sha256 hash of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_data(args: Any, splits: dict[str, Any]) -> dict[str, Any]:
    """Identify the splits: rows, columns and fingerprint, and the digest of the file that each came from."""
    found: dict[str, Any] = {}
    for name, data in splits.items():
        if data is None:
            continue
        rows = len(data) if hasattr(data, "__len__") else None
        found[name] = {"rows": rows, "columns": data.column_names, "fingerprint": getattr(data, "_fingerprint", None)}
        file = getattr(args, f"{name}_file", None)
        if file is not None:
            found[name]["sha256"] = sha256(Path(file).expanduser())
    return found


class Log:
    """``log.jsonl``: one row per logging step, with or without trackers.

    Args:
        path: path of the file. step: later rows, which a killed run left, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace") if step and path.exists() else ""
        rows = [row for row in map(_row, text.splitlines()) if row is not None and row["step"] <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _row(line: str) -> dict[str, Any] | None:
    """Parse a row of the log; None for a truncated line or one that is not a row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), (int, float)) else None
