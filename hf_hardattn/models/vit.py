"""ViT."""

from ..modeling.spec import ModelSpec, PatchSpec, TowerSpec

VIT = ModelSpec(
    name="vit",
    family="transformers.models.vit.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="ViTModel",
            layers="layers",
            attention="attention",
            norm="layernorm_before",
            protect_first=1,
            patches=PatchSpec("ViTEmbeddings"),
        ),
    ),
    recommended=("vision.tokens.25%",),
    heads=("ViTForImageClassification", "ViTForMaskedImageModeling", "ViTModel"),
    tiny={"num_channels": 2, "encoder_stride": 4},
    restored_heads=("ViTForMaskedImageModeling",),
)
