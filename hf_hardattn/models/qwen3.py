"""Qwen3: rows and keys of the prompt."""

from ..modeling import heads
from ..modeling.spec import ModelSpec, TowerSpec

QWEN3 = ModelSpec(
    name="qwen3",
    family="transformers.models.qwen3.",
    towers=(
        TowerSpec(
            "decoder",
            module="Qwen3Model",
            layers="layers",
            norm="input_layernorm",
            protect_last=True,
            prompt=True,
            restores=True,
        ),
    ),
    recommended=("decoder.tokens.*",),
    heads=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "Qwen3Model"),
    functions=heads.NEXT_TOKEN,
)
