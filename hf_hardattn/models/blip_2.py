"""BLIP-2: an image tower whose attention takes no mask, and a Q-Former in which only some layers read the image."""

from __future__ import annotations

from dataclasses import replace

from ..modeling.spec import AttentionSpec, ModelSpec, PatchSpec, TowerSpec
from . import _generate

WORDS = AttentionSpec("query", "key", "value", output=None, head_size="attention_head_size")

BLIP_2 = ModelSpec(
    name="blip_2",
    family="transformers.models.blip_2.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="Blip2VisionModel",
            layers="encoder.layers",
            attention_spec=AttentionSpec(
                fused="qkv", output="projection", scale="scale", interface=False, eager_only=True
            ),
            norm="layer_norm1",
            protect_first=1,
            patches=PatchSpec(
                "Blip2VisionEmbeddings",
                projection="patch_embedding",
                positions="position_embedding",
                cls="class_embedding",
            ),
        ),
        TowerSpec(
            "qformer",
            inputs="query_embeds",
            module="Blip2QFormerModel",
            layers="encoder.layer",
            attention="attention.attention",
            attention_spec=WORDS,
            cross="crossattention.attention",
            cross_spec=replace(WORDS, source="encoder_hidden_states", mask="encoder_attention_mask"),
            reads="vision",
            source_size="encoder_hidden_size",
            source_protected=(1, False),
            only=("cross",),
        ),
    ),
    recommended=("vision.tokens.25%",),
    heads=("Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval", "Blip2VisionModelWithProjection"),
    hands_down=False,
    functions={"prepare": _generate.prepare, "release": _generate.release},
)
