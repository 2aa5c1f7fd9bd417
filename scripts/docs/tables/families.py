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
