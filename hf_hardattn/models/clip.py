"""CLIP's image tower."""

from ..modeling.spec import AttentionSpec, ModelSpec, PatchSpec, TowerSpec

CLIP = ModelSpec(
    name="clip",
    family="transformers.models.clip.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="CLIPVisionModel",
            layers="encoder.layers",
            attention_spec=AttentionSpec(output="out_proj", scale="scale", dropout="dropout"),
            norm="layer_norm1",
            protect_first=1,
            patches=PatchSpec(
                "CLIPVisionEmbeddings",
                projection="patch_embedding",
                positions="position_embedding",
                cls="class_embedding",
            ),
        ),
    ),
    recommended=("vision.tokens.25%",),
    averaging_heads=("CLIPForImageClassification",),
    heads=("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
)
