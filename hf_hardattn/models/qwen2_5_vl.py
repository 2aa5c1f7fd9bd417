"""Qwen2.5-VL: the decoder's sites choose among the rows of images and videos, which keep their positions in all three axes."""

from ..modeling import heads
from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

QWEN2_5_VL = ModelSpec(
    name="qwen2_5_vl",
    family="transformers.models.qwen2_5_vl.",
    towers=(
        TowerSpec(
            "decoder",
            module="Qwen2_5_VLTextModel",
            layers="layers",
            attention_spec=AttentionSpec(rotary="position_embeddings"),
            norm="input_layernorm",
            protect_last=True,
            prompt=True,
            restores=True,
        ),
    ),
    recommended=("decoder.tokens.25%",),
    heads=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
    candidates=("image_token_id", "video_token_id"),
    functions=heads.NEXT_TOKEN,
)
