"""Read untrusted input: file names, JSON and configurations are checked before they are used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import HardAttentionConfig
from ..errors import HardAttentionError

MOST_BYTES = 10 * 1024 * 1024  # limit for a JSON file; the largest real index has about 1 MB
MOST_DEPTH = 32
MOST_SITES = 1000
LARGEST = 2**31 - 1
_NO_PART_OF_A_NAME = frozenset('\\:*?"<>|%')  # in other systems' paths, shells, and encoded slashes and dots


def check_name(name: str, where: str) -> str:
    """Return ``name`` if it is a plain relative path of a file inside its repository.

    Raises:
        HardAttentionError: the name is an absolute path, contains ``..``, a backslash, a drive, or a control or invisible character, or
            ends in a space or dot, which some systems drop.
    """
    parts = name.split("/")
    if len(name) > 1000 or not name.isprintable() or not all(map(_is_part, parts)):
        raise HardAttentionError(
            f"{name[:200]!r} is not a valid file name in {where}; a name is a relative path of plain characters, inside the repository. "
            "Nothing was read; do not use this repository."
        )
    return name


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Read a JSON object of limited size and depth with finite numbers only.

    Raises:
        HardAttentionError: the file does not exist, is too large or too deeply nested, or is not a JSON object.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise HardAttentionError(
                f"{path.name} of {where} has {path.stat().st_size:,} bytes; at most {MOST_BYTES:,} are allowed."
            )
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise HardAttentionError(f"{path.name} of {where} holds a {type(data).__name__}; it must hold an object.")
        for key, value in walk(data):
            if isinstance(value, float) and not math.isfinite(value):
                raise HardAttentionError(f"{path.name} of {where} says {key}={value}; numbers must be finite.")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, HardAttentionError):
            raise
        raise HardAttentionError(
            f"{path.name} of {where} cannot be read as JSON ({_line(error)}); the repository is incomplete or damaged."
        ) from error
    return data


def walk(data: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted name, value)`` for every value in JSON that is neither an object nor an array.

    Raises:
        HardAttentionError: the JSON is nested deeper than ``MOST_DEPTH``.
    """
    if depth > MOST_DEPTH:
        raise HardAttentionError(
            f"the JSON nests deeper than {MOST_DEPTH} levels at {name[:100]!r}; no real configuration does."
        )
    if isinstance(data, dict):
        for key, value in data.items():
            yield from walk(value, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from walk(value, f"{name}[{index}]", depth + 1)
    else:
        yield name, data


def read_config(data: Any, where: str) -> HardAttentionConfig:
    """Create a ``HardAttentionConfig`` from a dict of a file; any error in it is raised as a ``HardAttentionError``."""
    if not isinstance(data, dict):
        raise HardAttentionError(f"hard_attention of {where} is {str(data)[:100]!r}; it must be an object.")
    sites = data.get("sites")
    if isinstance(sites, (dict, list)) and len(sites) > MOST_SITES:
        raise HardAttentionError(
            f"hard_attention of {where} names {len(sites):,} sites; at most {MOST_SITES:,} are allowed. No model has so many; use globs."
        )
    for key, value in walk(data):
        if isinstance(value, str) and len(value) > 500:
            raise HardAttentionError(
                f"hard_attention of {where}: {key} has {len(value):,} characters; at most 500 are allowed."
            )
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
            raise HardAttentionError(
                f"hard_attention of {where}: {key}={str(value)[:40]} is out of range; numbers must stay within {LARGEST:,}."
            )
    try:
        return HardAttentionConfig.from_dict(data)
    except HardAttentionError:
        raise
    except Exception as error:  # a wrong type at any depth; the user needs its location, not a traceback
        raise HardAttentionError(
            f"hard_attention of {where} is not a configuration ({_line(error)}); only names and numbers are allowed, as "
            "HardAttentionConfig writes them."
        ) from error


def _is_part(part: str) -> bool:
    """Whether ``part`` is a plain component of a path."""
    return (
        0 < len(part.encode(errors="replace")) <= 255
        and part == part.strip()
        and not part.endswith(".")
        and not _NO_PART_OF_A_NAME & set(part)
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
