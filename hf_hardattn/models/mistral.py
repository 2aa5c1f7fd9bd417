"""Mistral: rows and keys of the prompt."""

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

MISTRAL = ModelSpec(
    name="mistral",
    family="transformers.models.mistral.",
    towers=(
        TowerSpec(
            "decoder",
            module="MistralModel",
            layers="layers",
            attention_spec=AttentionSpec(rotary="position_embeddings"),
            norm="input_layernorm",
            protect_last=True,
            prompt=True,
            restores=True,
            window="sliding_window",
        ),
    ),
    recommended=("decoder.tokens.25%",),
    heads=("MistralForCausalLM", "MistralForSequenceClassification", "MistralModel"),
    functions=heads.NEXT_TOKEN,
)
