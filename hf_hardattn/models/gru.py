"""The recurrent backbone: its decoder reads the source through one attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec


def target_table(model: nn.Module) -> Tensor | None:
    """Return the embeddings of the words that a label can be."""
    found: Any = getattr(model, "decoder", model)  # the decoder itself, while it is built
    return found.embed_tokens.weight


GRU = ModelSpec(
    name="gru",
    family="hf_hardattn.backbones.gru",
    towers=(
        TowerSpec(
            "decoder",
            module="GruDecoder",
            layers="layers",
            attention="",
            cross="attention",
            cross_spec=AttentionSpec(mask="mask", source="source", interface=False),
        ),
    ),
    recommended=("decoder.cross.*",),
    heads=("GruForConditionalGeneration",),
    functions={"target_table": target_table},
)
