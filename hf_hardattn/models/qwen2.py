"""Qwen2: rows and keys of the prompt."""

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

QWEN2 = ModelSpec(
    name="qwen2",
    family="transformers.models.qwen2.",
    towers=(
        TowerSpec(
            "decoder",
            module="Qwen2Model",
            layers="layers",
            attention_spec=AttentionSpec(rotary="position_embeddings"),
            norm="input_layernorm",
            protect_last=True,
            prompt=True,
            restores=True,
        ),
    ),
    recommended=("decoder.tokens.25%",),
    heads=("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2Model"),
    functions=heads.NEXT_TOKEN,
)
