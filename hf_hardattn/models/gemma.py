"""Gemma: rows and keys of the prompt."""

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

GEMMA = ModelSpec(
    name="gemma",
    family="transformers.models.gemma.",
    towers=(
        TowerSpec(
            "decoder",
            module="GemmaModel",
            layers="layers",
            attention_spec=AttentionSpec(rotary="position_embeddings"),
            norm="input_layernorm",
            protect_last=True,
            prompt=True,
            restores=True,
        ),
    ),
    recommended=("decoder.tokens.25%",),
    heads=("GemmaForCausalLM", "GemmaForSequenceClassification", "GemmaModel"),
    functions=heads.NEXT_TOKEN,
)
