"""The record of a card and its required fields. The card is this record in words, and nothing else.

A measured value may be ``{"not_measured": "why"}`` instead, and the card then says so; no field may be left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HardAttentionError
from .references import Resolver
from .untrusted import read_json

WORDS, NUMBER, TABLE, NAMES = "words", "a number", "a table of names to values", "a list of words"
NOT_MEASURED = "not_measured"
FORMS = ("full", "selectors", "adapter")
UNITS = ("share", "points", "plain")  # 0.25 means 25 %; 25 means 25 of 100; shown unchanged


class Measured:
    """A field that may be ``{"not_measured": "why"}``."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


class Optional:
    """A field that may be left out."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


FIELDS: dict[str, Any] = {
    "name": WORDS,
    "repo_id": WORDS,
    "availability": Optional(WORDS),  # location of the weights while the repository cannot be loaded
    "summary": WORDS,
    "form": WORDS,
    "model_class": WORDS,
    "auto_class": WORDS,
    "pipeline_tag": WORDS,
    "license": WORDS,
    "language": NAMES,
    "tags": NAMES,
    "base": {"model": WORDS, "revision": WORDS, "relation": WORDS, "license": WORDS},
    "selection": {
        "scorer": WORDS,
        "estimator": WORDS,
        "inference": WORDS,
        "always_kept": WORDS,
        "schedule": WORDS,
        "recipe": TABLE,
        "sites": [{"site": WORDS, "target": Measured(NUMBER), "achieved": Measured(NUMBER)}],
    },
    "task": {
        "type": WORDS,
        "dataset_type": WORDS,
        "dataset_name": WORDS,
        "split": WORDS,
        "revision": WORDS,
        "examples": Measured(NUMBER),
        "metric_type": WORDS,
        "metric_name": WORDS,
        "unit": WORDS,
    },
    "runs": [{"variant": WORDS, "seed": NUMBER, "status": WORDS, "value": Measured(NUMBER)}],
    "efficiency": Measured(
        {
            "rows": [
                {
                    "variant": WORDS,
                    "gflops": Measured(NUMBER),
                    "examples_per_second": Measured(NUMBER),
                    "speedup": Measured(NUMBER),
                }
            ],
            "machine": TABLE,
        }
    ),
    "faithfulness": Measured({"parity": NUMBER, "statements": NAMES, "reads_as": WORDS}),
    "subgroups": Measured(
        {
            "quality": Measured([{"group": WORDS, "examples": NUMBER, "hard": NUMBER, "soft": NUMBER}]),
            "selection": NAMES,
            "reads_as": WORDS,
        }
    ),
    "data": [{"name": WORDS, "source": WORDS, "licence": WORDS, "splits": WORDS, "people": WORDS}],
    "uses": {"intended": NAMES, "out_of_scope": NAMES, "limits": NAMES},
    "external_validation": WORDS,
    "energy": Measured(
        {
            "kwh": NUMBER,
            "co2_grams": NUMBER,
            "how": WORDS,
            "scope": WORDS,
            "software": WORDS,
            "hardware": WORDS,
            "region": WORDS,
        }
    ),
    "transparency": {
        "parameters": Measured(NUMBER),
        "selector_parameters": Measured(NUMBER),
        "training_flop": Measured(NUMBER),
        "training_seconds": Measured(NUMBER),
    },
    "pictures": [{"file": WORDS, "alt": WORDS}],
    "versions": TABLE,
    "reproduce": {"commands": NAMES, "hashes": Measured(TABLE)},
    "sources": TABLE,  # results file to sha256, written by ``read_record``
}
VARIANTS = ("hard", "soft", "random")  # the result of a hard model is only meaningful next to both controls


def read_record(path: Path) -> dict[str, Any]:
    """Read the source of a card, follow its references, and check that nothing is missing.

    Returns:
        The record, with ``sources``: results file to sha256.

    Raises:
        HardAttentionError: see ``Resolver`` and ``check_record``.
    """
    resolver = Resolver(path.parent)
    record = resolver.resolve(read_json(path, str(path.parent)))
    record["sources"] = dict(sorted(resolver.sources.items()))
    check_record(record, str(path))
    return record


def check_record(record: dict[str, Any], where: str) -> None:
    """Raise ``HardAttentionError`` that lists all missing, unknown and wrongly typed fields."""
    problems = list(_problems(record, FIELDS, ""))
    if not problems:
        problems = list(_odd(record))
    if problems:
        raise HardAttentionError(
            f"the record of {where} is incomplete: {'; '.join(problems[:8])}{' ...' if len(problems) > 8 else ''}. "
            'A card must be complete; measure what is missing, or write {"not_measured": "why"} where that is allowed.'
        )


def missing(value: Any) -> str | None:
    """Return why a value was not measured; None if it was."""
    return str(value[NOT_MEASURED]) if isinstance(value, dict) and NOT_MEASURED in value else None


def _odd(record: dict[str, Any]) -> Iterator[str]:
    if record["form"] not in FORMS:
        yield f"form={record['form']!r} (known: {', '.join(FORMS)})"
    if record["task"]["unit"] not in UNITS:
        yield f"task.unit={record['task']['unit']!r} (known: {', '.join(UNITS)})"
    for variant in VARIANTS:
        if not any(run["variant"] == variant for run in record["runs"]):
            yield f"runs of '{variant}' (failed runs count too)"
    if not any(run["variant"] == "hard" and missing(run["value"]) is None for run in record["runs"]):
        yield "a value of a run of 'hard'"


def _problems(value: Any, kind: Any, where: str) -> Iterator[str]:
    if isinstance(kind, Measured):
        if missing(value) is None:
            yield from _problems(value, kind.kind, where)
        elif len(value) != 1 or not missing(value):
            yield f"{where}: not_measured must give a reason and be the only key"
    elif isinstance(kind, dict):
        yield from _problems_of_object(value, kind, where)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{where} is not a list"
            return
        for index, row in enumerate(value):
            yield from _problems(row, kind[0], f"{where}[{index}]")
    elif not _fits(value, kind):
        yield f"{where}={json.dumps(value, default=str)[:60]} is not {kind}"


def _problems_of_object(value: Any, kind: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where or 'the record'} is not an object"
        return
    for key, wanted in kind.items():
        optional = isinstance(wanted, Optional)
        if key in value:
            yield from _problems(value[key], wanted.kind if optional else wanted, f"{where}.{key}".lstrip("."))
        elif not optional:
            yield f"{where}.{key} is missing".lstrip(".")
    for key in sorted(value.keys() - kind.keys()):
        yield f"{where}.{key} is unknown".lstrip(".")


def _fits(value: Any, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind == WORDS:
        return isinstance(value, str) and bool(value.strip())
    if kind == NUMBER:
        return number
    if kind == NAMES:
        return isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)
    return isinstance(value, dict) and bool(value) and all(_plain(item) for item in value.values())


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, (str, bool, int)) for item in value)
    return value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))
