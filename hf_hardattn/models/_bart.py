"""The common row of BART and its successors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec


def bart_like(
    name: str,
    classes: str,
    norm: str | None,
    encoder: Mapping[str, Any],
    heads: tuple[str, ...] = ("ForConditionalGeneration", "ForQuestionAnswering", "ForSequenceClassification", "Model"),
    copying_heads: tuple[str, ...] = ("ForQuestionAnswering", "ForSequenceClassification", "Model"),
    **fields: Any,
) -> ModelSpec:
    """Return the row of a family whose classes start with ``classes`` and are otherwise BART's.

    Args:
        norm: path of the norm before the self-attention, from a layer; None if the norm comes after it.
        encoder: fields of the encoder's row. heads, copying_heads: suffixes of their names. fields: further fields of the family's row.
    """
    attention = AttentionSpec(output="out_proj", dropout="dropout", source="key_value_states")
    stack: dict[str, Any] = dict(layers="layers", attention_spec=attention, norm=norm)
    encoder_row = TowerSpec("encoder", module=f"{classes}Encoder", **stack, restores=True, **encoder)
    decoder_row = TowerSpec(
        "decoder",
        module=f"{classes}Decoder",
        **stack,
        causal=True,
        heads="decoder_attention_heads",
        cross="encoder_attn",
        cross_spec=attention,
        reads="encoder",
        source_protected=(0, encoder_row.protect_last),
    )
    functions = fields.pop("functions", {})
    return ModelSpec(
        name=name,
        family=f"transformers.models.{name}.",
        towers=(encoder_row, decoder_row),
        recommended=("decoder.cross.*", "encoder.tokens.25%"),
        heads=tuple(f"{classes}{head}" for head in heads),
        copying_heads=tuple(f"{classes}{head}" for head in copying_heads),
        functions={"target_table": target_table, **functions},
        **fields,
    )


def target_table(model: nn.Module) -> Tensor | None:
    """Return the embeddings of the words that a label can be, or the classifier's weight."""
    projection: Any = getattr(model, "lm_head", getattr(model, "proj_out", None))
    if projection is None:
        projection = getattr(
            getattr(model, "classification_head", None), "out_proj", getattr(model, "classifier", None)
        )
    return None if projection is None else projection.weight
