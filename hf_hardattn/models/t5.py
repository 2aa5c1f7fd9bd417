"""T5: a relative position bias that later layers share, and a decoder that reads the encoder."""

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
STACK: dict[str, Any] = dict(
    module="T5Stack",
    layers="block",
    attention="layer.0.SelfAttention",
    attention_spec=ATTENTION,
    norm="layer.0.layer_norm",
)


def target_table(model: nn.Module) -> Tensor | None:
    """The embeddings of the words that a label can be, or the classifier's weight."""
    if heads.extends(model, ["T5ForConditionalGeneration"]):
        table: Any = model.shared
        return table.weight
    return heads.target_table(model)


def token_loss(
    model: nn.Module, inputs: dict[str, Any], output: Any, known: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """For question answering, the mean loss of both ends of the answer."""
    if output.get("start_logits") is None or inputs.get("start_positions") is None:
        return heads.token_loss(model, inputs, output, known)
    ends = [(output.start_logits, inputs["start_positions"]), (output.end_logits, inputs["end_positions"])]
    losses = [
        nn.functional.cross_entropy(x.float(), y.view(-1).clamp(0, x.shape[1] - 1), reduction="none") for x, y in ends
    ]
    loss = (losses[0] + losses[1]).unsqueeze(-1) / 2
    return loss, torch.ones_like(loss, dtype=torch.bool)


T5 = ModelSpec(
    name="t5",
    family="transformers.models.t5.",
    towers=(
        TowerSpec("encoder", **STACK, where={"is_decoder": False}, protect_last=True, restores=True),
        TowerSpec(
            "decoder",
            **STACK,
            where={"is_decoder": True},
            causal=True,
            cross="layer.1.EncDecAttention",
            cross_spec=ATTENTION,
            reads="encoder",
            source_protected=(0, True),
        ),
    ),
    recommended=("decoder.cross.*", "encoder.tokens.25%"),
    heads=(
        "T5ForConditionalGeneration",
        "T5EncoderModel",
        "T5ForQuestionAnswering",
        "T5ForSequenceClassification",
        "T5ForTokenClassification",
        "T5Model",
    ),
    copying_heads=("T5ForQuestionAnswering", "T5ForSequenceClassification"),
    functions={"target_table": target_table, "token_loss": token_loss},
)
