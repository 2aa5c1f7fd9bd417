"""DINOv3: registers behind CLS, and patches turned by their place in the image; in training, stock code jitters these places."""

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
