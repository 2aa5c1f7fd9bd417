"""The common row of SigLIP and SigLIP 2: no CLS, an image's rows are pooled by an attention, a text at its last position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..modeling import heads
from ..modeling.arguments import Arguments
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

ATTENTION = AttentionSpec(output="out_proj", scale="scale", dropout="dropout")


def refuse_hidden_end(tower: Any, arguments: Arguments) -> None:
    """Refuse a text with padding at its last position, where the tower pools it.

    Raises:
        HardAttentionError: if a text has padding there.
    """
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and not torch.compiler.is_compiling() and not mask[:, -1].all():
        raise HardAttentionError(
            "attention_mask hides the last position of a text at 'text', where SigLIP pools; hard attention keeps no padding. Pad "
            "texts to the full length and pass no mask, as in the model's training."
        )


def pair_loss(
    model: nn.Module, inputs: dict[str, Any], output: Any, known: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return the loss of each text with every image, for the contrastive model."""
    logits = output.get("logits_per_text")
    if logits is None:
        return heads.token_loss(model, inputs, output, known)
    signs = 2.0 * torch.eye(len(logits), device=logits.device) - 1.0
    loss = -nn.functional.logsigmoid(signs * logits.float()).sum(-1, keepdim=True)
    return loss, torch.ones_like(loss, dtype=torch.bool)


def siglip_like(
    name: str,
    classes: str,
    vision: TowerSpec,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    counting_heads: tuple[str, ...] = (),
) -> ModelSpec:
    """Return the row of a family whose classes start with ``classes``.

    Args:
        vision: the row of its image tower. functions, counting_heads: fields of the family's row.
    """
    text = TowerSpec(
        "text",
        module=f"{classes}TextModel",
        layers="encoder.layers",
        attention_spec=ATTENTION,
        norm="layer_norm1",
        protect_last=True,
        always=refuse_hidden_end,
        pools_by_place=True,
    )
    return ModelSpec(
        name=name,
        family=f"transformers.models.{name}.",
        towers=(vision, text),
        recommended=("vision.tokens.25%", "text.tokens.25%"),
        averaging_heads=(f"{classes}ForImageClassification",),
        heads=tuple(f"{classes}{head}" for head in ("VisionModel", "ForImageClassification", "TextModel", "Model")),
        counting_heads=counting_heads,
        functions={"token_loss": pair_loss, **(functions or {})},
    )
