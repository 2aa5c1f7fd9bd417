"""SigLIP's image tower: no CLS, an attention pools the rows that are left."""

from ..modeling.spec import AttentionSpec, ModelSpec, PatchSpec, TowerSpec

SIGLIP = ModelSpec(
    name="siglip",
    family="transformers.models.siglip.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="SiglipVisionModel",
            layers="encoder.layers",
            attention_spec=AttentionSpec(output="out_proj", scale="scale", dropout="dropout"),
            norm="layer_norm1",
            pooling="head.attention",
            patches=PatchSpec(
                "SiglipVisionEmbeddings",
                projection="patch_embedding",
                positions="position_embedding",
                cls=None,
                fixed_size=False,
            ),
        ),
    ),
    recommended=("vision.tokens.25%",),
    averaging_heads=("SiglipForImageClassification",),
    heads=("SiglipVisionModel", "SiglipForImageClassification"),
)
