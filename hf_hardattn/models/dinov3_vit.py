"""DINOv3: registers follow CLS, and rotary angles encode a patch's position in the image, which the stock code jitters in training."""

from ..modeling.spec import AttentionSpec, ModelSpec, TowerSpec

DINOV3 = ModelSpec(
    name="dinov3_vit",
    family="transformers.models.dinov3_vit.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="DINOv3ViTModel",
            layers="model.layer",
            attention="attention",
            attention_spec=AttentionSpec(dropout="dropout", rotary="position_embeddings"),
            norm="norm1",
            protect_first=(1, "num_register_tokens"),
        ),
    ),
    recommended=("vision.tokens.25%",),
    heads=("DINOv3ViTModel",),
    tiny={"num_register_tokens": 2},
)
