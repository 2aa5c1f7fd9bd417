"""The families of models with their sites, from the rows of `hf_hardattn/models/`."""

from __future__ import annotations

from hf_hardattn import models


def table() -> str:
    """Family, classes that the contract suites run, and sites."""
    lines = ["| family | sites | classes tested |", "|---|---|---|"]
    for name in models.names():
        spec = models.load(name).spec
        sites = ", ".join(f"`{tower.name}.{kind}`" for tower in spec.towers for kind in tower.kinds)
        lines.append(f"| {name} | {sites} | {', '.join(f'`{head}`' for head in spec.heads)} |")
    return "\n".join(lines)


def short() -> str:
    """One row for all families with the same towers, for the README."""
    groups: dict[str, list[str]] = {}
    for name in models.names():
        spec = models.load(name).spec
        sites = "; ".join(f"`{tower.name}`: {', '.join(tower.kinds)}" for tower in spec.towers)
        groups.setdefault(sites, []).append(name)
    return "\n".join(
        ["| families | kinds of site in each tower |", "|---|---|"]
        + [f"| {', '.join(names)} | {sites} |" for sites, names in groups.items()]
    )
