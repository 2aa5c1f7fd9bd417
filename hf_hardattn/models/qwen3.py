"""Qwen3: rows and keys of the prompt."""

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

QWEN3 = ModelSpec(
    name="qwen3",
    family="transformers.models.qwen3.",
    towers=(
        TowerSpec(
            "decoder",
            module="Qwen3Model",
            layers="layers",
            attention_spec=AttentionSpec(rotary="position_embeddings", query_norm="q_norm", key_norm="k_norm"),
            norm="input_layernorm",
            protect_last=True,
            prompt=True,
            restores=True,
        ),
    ),
    recommended=("decoder.tokens.25%",),
    heads=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "Qwen3Model"),
    functions=heads.NEXT_TOKEN,
)
