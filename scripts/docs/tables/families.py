"""The families of models with their sites, from the rows of `hf_hardattn/models/`."""

from __future__ import annotations

from typing import Any

from hf_hardattn import models

from . import read


def table() -> str:
    """Family, classes that the contract suites run, and sites."""
    lines = ["| family | sites | classes tested |", "|---|---|---|"]
    for name in models.names():
        spec = models.load(name).spec
        sites = ", ".join(f"`{tower.name}.{kind}`" for tower in spec.towers for kind in tower.kinds)
        lines.append(f"| {name} | {sites} | {', '.join(f'`{head}`' for head in spec.heads)} |")
    return "\n".join(lines)


COLUMNS = {
    "equals_stock": "budget 1.0 = stock",
    "equals_oracle": "= stock with masks",
    "rows_alone": "batch = rows",
    "cache_changes_nothing": "cache = no cache",
    "certified": "certificate",
    "gates_reach_attention": "gradient",
    "reloads": "reload",
    "compiles": "one graph",
    "flex_attends": "flex attention",
}


def checks() -> str:
    """Which promises each family keeps, from results/families.json; below it the reasons of those that it does not."""
    reasons: dict[str, int] = {}
    grouped: dict[tuple[str, ...], list[str]] = {}
    for line in sorted(read("families.json")["rows"], key=lambda line: line["family"]):
        cells = tuple(_cell(name, line, reasons) for name in COLUMNS)
        grouped.setdefault((line["family"], line["tower"], *cells), []).append(line["kind"])
    head = ["family", "sites", *COLUMNS.values()]
    rows = [
        f"| {family} | `{tower}`: {', '.join(kinds)} | {' | '.join(cells)} |"
        for (family, tower, *cells), kinds in grouped.items()
    ]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([f"| {' | '.join(head)} |", "|---|---|" + ":-:|" * len(COLUMNS), *rows, "", *notes])


def _cell(name: str, line: dict[str, Any], reasons: dict[str, int]) -> str:
    found = line["checks"].get(name)
    if found is None:
        slow = name in ("compiles", "flex_attends")
        return "not run" if slow else "–"
    return "✓" if found == "holds" else f"({reasons.setdefault(found, len(reasons) + 1)})"


ROLES = {  # by the towers of a family
    frozenset({"vision"}): "images",
    frozenset({"text"}): "texts",
    frozenset({"encoder", "decoder"}): "encoder–decoders",
    frozenset({"decoder"}): "decoders",
}


def short() -> str:
    """The families by what they read, for the README."""
    groups: dict[str, list[str]] = {}
    for name in models.names():
        towers = frozenset(tower.name for tower in models.load(name).spec.towers)
        groups.setdefault(ROLES.get(towers, "images and texts"), []).append(name)
    order = [*ROLES.values(), "images and texts"]
    return "\n".join(f"- {role}: {', '.join(groups[role])}" for role in order if role in groups)
