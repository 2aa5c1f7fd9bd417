"""DeiT: a distillation token follows CLS."""

from ..modeling.spec import ModelSpec, TowerSpec

DEIT = ModelSpec(
    name="deit",
    family="transformers.models.deit.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="DeiTModel",
            layers="layers",
            attention="attention",
            norm="layernorm_before",
            protect_first=2,
        ),
    ),
    recommended=("vision.tokens.25%",),
    heads=("DeiTForImageClassification", "DeiTModel"),
)
