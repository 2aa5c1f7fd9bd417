"""Suites of the benchmark. Each is a YAML file, whose name is that of the suite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import HardAttentionError, unknown
from ..workloads import Workload

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One hard configuration of a workload.

    Attributes:
        name: name in the report. hard: the configuration.
        targets: target speed-ups over ``stock``, ``exact`` and the row ``beside``, and target share of the cross-attention ``cache``.
        floor: the row keeps one position: no selection is faster, and the group's limits lie between this row and stock.
        trained: use the selectors of the checkpoint that the workload names; needed if the scores determine how much is kept, and so the
            cost.
        beside: a row of the group that computes the same in another way; speed and outputs are compared with it.
    """

    name: str
    hard: dict[str, Any]
    targets: dict[str, float] = field(default_factory=dict)
    floor: bool = False
    trained: bool = False
    beside: str | None = None


@dataclass(frozen=True)
class Group:
    """A workload with its rows, timed together.

    Attributes:
        stock: also time the stock model; False if it needs more memory than available (no speed-up over it is shown then).
    """

    name: str
    workload: Workload
    rows: tuple[Row, ...]
    stock: bool = True


@dataclass(frozen=True)
class Suite:
    """Groups, and the picture that shows them.

    Attributes:
        picture: ``pareto`` | ``growth`` | ``break_even``.
        runtime: ``pytorch``, or ``onnxruntime`` for exported models (no picture).
    """

    name: str
    title: str
    groups: tuple[Group, ...]
    picture: str = "pareto"
    runtime: str = "pytorch"


def names() -> list[str]:
    """Return the names of the suites."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Suite:
    """Read the suite ``name``, or a YAML file of the same form."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise unknown("suite", name, names())
    return parse(yaml.safe_load(path.read_text(encoding="utf-8")), path.stem)


def parse(data: dict[str, Any], name: str) -> Suite:
    """Build a suite; lists under ``sizes`` and ``budgets`` are expanded to all combinations."""
    groups = tuple(group for item in data["groups"] for group in _groups(item))
    if not groups:
        raise HardAttentionError(f"suite {name!r} has no groups; name a model, its size and rows.")
    return Suite(name, data.get("title", name), groups, data.get("picture", "pareto"), data.get("runtime", "pytorch"))


def _groups(item: dict[str, Any]) -> Iterator[Group]:
    shape = {k: v for k, v in item.items() if k not in ("name", "size", "sizes", "rows", "stock_up_to")}
    for size in item.get("sizes", [item.get("size")]):
        rows = []
        for row in item["rows"]:
            for budget in row.get("budgets", [None]):
                hard = dict(row["hard"]) if budget is None else {**row["hard"], "budget": budget}
                options = {name: row[name] for name in ("targets", "floor", "trained", "beside") if name in row}
                rows.append(Row(row["name"].format(budget=budget), hard, **options))
        stock = size <= item.get("stock_up_to", size)
        yield Group(item["name"].format(size=size), Workload(size=size, **shape), tuple(rows), stock)
