"""A decoder of any family that reads an encoder of any family: it finds the encoder's rows by index, so none may be dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..modeling import heads
from ..modeling.spec import ModelSpec, TowerSpec
from . import towers_inside


def find_encoder(model: Any) -> dict[str, tuple[TowerSpec, nn.Module]]:
    """Return the encoder's tower, with the row of the family of the model inside."""
    if not heads.extends(model, ["EncoderDecoderModel", "VisionEncoderDecoderModel"]):
        return {}
    found = towers_inside(model, {"vision": "encoder", "text": "encoder"})
    return {name: (replace(spec, only=("self",)), module) for name, (spec, module) in found.items()}


def reading(name: str, tower: TowerSpec) -> ModelSpec:
    """Return the row of a family that combines any encoder with any decoder.

    Args:
        tower: the usual encoder; ``find_encoder`` finds the one that a checkpoint actually has.
    """
    return ModelSpec(
        name=name,
        family=f"transformers.models.{name}.",
        towers=(replace(tower, only=("self",)),),
        recommended=(f"{tower.name}.self.*",),
        find_towers=find_encoder,
    )
