"""The source of a card refers to its numbers by their location: ``{"$ref": "results/demo.json#/models/hard/accuracy"}``.

In a list, ``{"$each": "results/x.json#/runs", "where": {"variant": "simple"}, "row": {"seed": {"$ref": "@/seed"}}}`` stands for one row
per matching element; ``@`` is the element, and a reference to it may have an ``"else"`` (a failed run has no value). A literal number is
refused, so every number in a card was written by a command.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import HardAttentionError


class Resolver:
    """Replace references by the values that they point to.

    Args:
        folder: folder that file names are relative to.

    Attributes:
        sources: maps each results file that was read to its sha256.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.sources = folder, dict[str, str]()
        self._read: dict[str, Any] = {}

    def resolve(self, data: Any, where: str = "", row: Any = None) -> Any:
        """Return ``data`` with all references replaced.

        Args:
            where: place in the source, for errors. row: the element that ``@`` stands for.

        Raises:
            HardAttentionError: a results file or a value in it is missing, or a number is written literally.
        """
        if isinstance(data, dict) and "$ref" in data:
            return self._follow(data, where, row)
        if isinstance(data, dict):
            return {key: self.resolve(value, f"{where}.{key}".lstrip("."), row) for key, value in data.items()}
        if isinstance(data, list):
            found: list[Any] = []
            for index, value in enumerate(data):
                place = f"{where}[{index}]"
                found += (
                    self._rows(value, place)
                    if isinstance(value, dict) and "$each" in value
                    else [self.resolve(value, place, row)]
                )
            return found
        if isinstance(data, (int, float)) and not isinstance(data, bool):
            raise HardAttentionError(
                f'{where}={data} is written by hand; a card\'s numbers must come from results JSON. Use {{"$ref": "file.json#/where/it/is"}}.'
            )
        return data

    def _rows(self, data: dict[str, Any], where: str) -> list[Any]:
        each = self._follow({"$ref": data["$each"]}, where, None)
        if not isinstance(each, list) or not all(isinstance(row, dict) for row in each):
            raise HardAttentionError(f"{data['$each']} is not a list of rows; '$each' needs one; at {where}.")
        wanted = data.get("where", {})
        rows = [row for row in each if all(row.get(key) == value for key, value in wanted.items())]
        if not rows:
            raise HardAttentionError(
                f"no row of {data['$each']} has {wanted}; no row of a card may be missing; at {where}."
            )
        return [self.resolve(data.get("row", {}), where, row) for row in rows]

    def _follow(self, data: dict[str, Any], where: str, row: Any) -> Any:
        reference = str(data["$ref"])
        name, _, pointer = ("@", "", reference[1:]) if reference.startswith("@") else reference.partition("#")
        value = row if name == "@" else self._file(name, where)
        for part in [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]:
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, ValueError, TypeError):
                if name == "@" and "else" in data:
                    return self.resolve(data["else"], where, row)
                raise HardAttentionError(
                    f"{reference} is not in the results ('{part}' is missing); no number of a card may be missing; "
                    f'at {where}. Run the command that writes it, or write {{"not_measured": "why"}}.'
                ) from None
        return value

    def _file(self, name: str, where: str) -> Any:
        if name not in self._read:
            try:
                content = (self.folder / name).read_bytes()
                self._read[name] = json.loads(content)
            except (OSError, ValueError) as error:
                raise HardAttentionError(
                    f"{name} cannot be read ({error}); the numbers of the card come from it; at {where}. Run the command that writes it."
                ) from error
            self.sources[name] = hashlib.sha256(content).hexdigest()
        return self._read[name]
