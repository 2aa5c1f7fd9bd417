"""DINOv2 with registers: rows after CLS that belong to no patch and are always kept."""

from ..modeling.spec import ModelSpec, TowerSpec

DINOV2_WITH_REGISTERS = ModelSpec(
    name="dinov2_with_registers",
    family="transformers.models.dinov2_with_registers.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="Dinov2WithRegistersModel",
            layers="encoder.layer",
            attention="attention",
            norm="norm1",
            protect_first=(1, "num_register_tokens"),
        ),
    ),
    recommended=("vision.tokens.25%",),
    averaging_heads=("Dinov2WithRegistersForImageClassification",),
    heads=("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel"),
    tiny={"num_register_tokens": 2},
)
