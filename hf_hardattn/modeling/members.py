"""Check that the layers of a hard tower are those to which hard attention was attached, in their order.

Each layer's hooks follow a plan that was made for its place. A layer without a plan, or in another place, would compute with what was
dropped, or leave a site out, without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import HardAttentionError
from .arguments import takes_keywords
from .family import Tower
from .plan import TowerPlan

MEMBER = "hard_attention_member"  # on each layer of a hard tower: its index
CHECKED = "hard_attention_checked"  # on the tower: the ids of its layers at the last check


def check_layers(towers: Iterable[Tower]) -> None:
    """Refuse layers that cannot have a plan of their own.

    Raises:
        HardAttentionError: if a user's own layer has a strict signature, or two layers are one module or share their attention.
    """
    seen: dict[int, str] = {}
    for place, tower, layer in (
        (f"layer {n} of '{t.name}'", t, layer) for t in towers for n, layer in enumerate(t.layers)
    ):
        if not takes_keywords(layer):
            raise HardAttentionError(
                f"{place} is a {type(layer).__name__}, whose forward accepts no extra keyword arguments; hard attention passes the state of a "
                "call to its layers as a keyword argument, as Transformers does. Add **kwargs to its forward and pass them on."
            )
        for part in (layer, *tower.attentions(layer)):
            if seen.setdefault(id(part), place) != place:
                raise HardAttentionError(
                    f"{seen[id(part)]} and {place} share one {type(part).__name__}; hard attention plans each layer for its place, so each "
                    "needs a module of its own. Put a copy.deepcopy of it in one of the places."
                )


def mark(tower: Tower) -> None:
    """Mark the layers that the tower has."""
    for number, layer in enumerate(tower.layers):
        layer.__dict__[MEMBER] = number
    tower.module.__dict__[CHECKED] = tuple(map(id, tower.layers))


def check(tower: nn.Module, plan: TowerPlan) -> None:
    """Check the layers again if the list has changed.

    They may be copied, wrapped or put into another list; layers without a site may be missing.

    Raises:
        HardAttentionError: if hard attention was not attached to a layer, the order differs, or a site is missing.
    """
    if torch.compiler.is_compiling():
        return
    layers: Any = tower.get_submodule(plan.layers)
    found = tuple(map(id, layers))
    if found == tower.__dict__.get(CHECKED):
        return
    order: list[int] = []
    for number, layer in enumerate(layers):
        known = [part.__dict__[MEMBER] for part in layer.modules() if MEMBER in part.__dict__]
        if not known:
            raise _changed(
                f"layer {number} of '{plan.name}' ({type(layer).__name__}) was added after hard attention was applied: it has no site, and "
                "would compute dropped rows."
            )
        order += known
    if order != sorted(set(order)):
        raise _changed(
            f"the layers of '{plan.name}' are no longer in the order in which hard attention was applied to them: {order}. Each is hooked for "
            "its own place, and would compute rows that were dropped elsewhere."
        )
    missing = sorted(set(plan.needs) - set(order))
    if missing:
        raise _changed(
            f"layer {missing[0]} of '{plan.name}' is gone; hard attention was applied to a site in it, or to pool the rows after it."
        )
    tower.__dict__[CHECKED] = found


def _changed(what: str) -> HardAttentionError:
    return HardAttentionError(
        f"{what} Call hf_hardattn.apply(model, model.config.hard_attention) again; trained selectors are kept."
    )


def unmark(module: nn.Module) -> None:
    """Remove the marks of a layer or a tower."""
    module.__dict__.pop(MEMBER, None)
    module.__dict__.pop(CHECKED, None)
