"""Check that a hard tower has exactly the layers to which hard attention was attached.

A layer added later has no hooks. It would compute with what was dropped, or leave a site out, without anyone noticing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import HardAttentionError
from .arguments import takes_keywords
from .family import Tower

MEMBER = "hard_attention_member"  # on each layer of a hard tower: the tower's name
CHECKED = "hard_attention_checked"  # on the tower: the ids of its layers at the last check


def check_signatures(tower: Tower) -> None:
    """Refuse layers whose ``forward`` cannot receive the state of a call.

    Raises:
        HardAttentionError: if a user's own layer has a strict signature.
    """
    for number, layer in enumerate(tower.layers):
        if not takes_keywords(layer):
            raise HardAttentionError(
                f"layer {number} of '{tower.name}' is a {type(layer).__name__}, whose forward accepts no extra keyword arguments; hard attention "
                "passes the state of a call to its layers as a keyword argument, as Transformers does. Add **kwargs to its forward and pass them on."
            )


def mark(tower: Tower) -> None:
    """Mark the layers that the tower has."""
    for layer in tower.layers:
        layer.__dict__[MEMBER] = tower.name
    tower.module.__dict__[CHECKED] = tuple(map(id, tower.layers))


def check(tower: nn.Module, path: str, name: str) -> None:
    """Check the layers again if the list has changed; it may be sliced, joined, or contain wrapped layers.

    Raises:
        HardAttentionError: if hard attention was not attached to a layer.
    """
    if torch.compiler.is_compiling():
        return
    layers: Any = tower.get_submodule(path)
    found = tuple(map(id, layers))
    if found == tower.__dict__.get(CHECKED):
        return
    for number, layer in enumerate(layers):
        if not any(MEMBER in part.__dict__ for part in layer.modules()):
            raise HardAttentionError(
                f"layer {number} of '{name}' ({type(layer).__name__}) was added after hard attention was applied: it has no site, and would "
                "compute dropped rows. Call hf_hardattn.apply(model, model.config.hard_attention) again; trained selectors are kept."
            )
    tower.__dict__[CHECKED] = found


def unmark(module: nn.Module) -> None:
    """Remove the marks of a layer or a tower."""
    module.__dict__.pop(MEMBER, None)
    module.__dict__.pop(CHECKED, None)
