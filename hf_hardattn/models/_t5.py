"""The common row of T5 and its successors: a relative position bias, and a decoder that reads the encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

ATTENTION = AttentionSpec(
    "q",
    "k",
    "v",
    output="o",
    head_size="key_value_proj_dim",
    dropout="dropout",
    mask="mask",
    source="key_value_states",
    position_bias=True,
)


def target_table(model: nn.Module) -> Tensor | None:
    """Return the embeddings of the words that a label can be, or the classifier's weight."""
    if hasattr(model, "lm_head"):
        table: Any = model.shared
        return table.weight
    return heads.target_table(model)


def token_loss(
    model: nn.Module, inputs: dict[str, Any], output: Any, known: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return the loss of each label; for question answering, the mean loss of both ends of the answer."""
    if output.get("start_logits") is None or inputs.get("start_positions") is None:
        return heads.token_loss(model, inputs, output, known)
    ends = [(output.start_logits, inputs["start_positions"]), (output.end_logits, inputs["end_positions"])]
    losses = [
        nn.functional.cross_entropy(x.float(), y.view(-1).clamp(0, x.shape[1] - 1), reduction="none") for x, y in ends
    ]
    loss = (losses[0] + losses[1]).unsqueeze(-1) / 2
    return loss, torch.ones_like(loss, dtype=torch.bool)


def t5_like(name: str, classes: str, attention: AttentionSpec) -> ModelSpec:
    """Return the row of a family whose classes start with ``classes`` and are otherwise T5's.

    Args:
        attention: the names inside its attention modules.
    """
    stack: dict[str, Any] = dict(
        module=f"{classes}Stack",
        layers="block",
        attention="layer.0.SelfAttention",
        attention_spec=attention,
        norm="layer.0.layer_norm",
    )
    decoder = TowerSpec(
        "decoder",
        **stack,
        where={"is_decoder": True},
        causal=True,
        cross="layer.1.EncDecAttention",
        cross_spec=attention,
        reads="encoder",
        source_protected=(0, True),
    )
    names = (
        "ForConditionalGeneration",
        "EncoderModel",
        "ForQuestionAnswering",
        "ForSequenceClassification",
        "ForTokenClassification",
        "Model",
    )
    return ModelSpec(
        name=name,
        family=f"transformers.models.{name}.",
        towers=(
            TowerSpec("encoder", **stack, where={"is_decoder": False}, protect_last=True, restores=True),
            decoder,
        ),
        recommended=("decoder.cross.*", "encoder.tokens.25%"),
        heads=tuple(f"{classes}{head}" for head in names),
        copying_heads=(f"{classes}ForQuestionAnswering", f"{classes}ForSequenceClassification"),
        functions={"target_table": target_table, "token_loss": token_loss},
    )
