"""Qwen2.5-VL: the decoder's sites choose among the rows of images and videos, which keep their positions in all three axes."""

from ..modeling import heads
from ..modeling.spec import ModelSpec
from ._llama import decoder

QWEN2_5_VL = ModelSpec(
    name="qwen2_5_vl",
    family="transformers.models.qwen2_5_vl.",
    towers=(decoder("Qwen2_5_VLTextModel"),),
    recommended=("decoder.tokens.25%",),
    heads=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
    candidates=("image_token_id", "video_token_id"),
    functions=heads.NEXT_TOKEN,
)
