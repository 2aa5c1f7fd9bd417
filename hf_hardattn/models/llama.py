"""Llama: rows and keys of the prompt."""

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

LLAMA = ModelSpec(
    name="llama",
    family="transformers.models.llama.",
    towers=(
        TowerSpec(
            "decoder",
            module="LlamaModel",
            layers="layers",
            attention_spec=AttentionSpec(rotary="position_embeddings"),
            norm="input_layernorm",
            protect_last=True,
            prompt=True,
            restores=True,
        ),
    ),
    recommended=("decoder.tokens.25%",),
    heads=("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"),
    functions=heads.NEXT_TOKEN,
)
