"""DINOv2."""

from ..modeling.spec import ModelSpec, PatchSpec, TowerSpec

DINOV2 = ModelSpec(
    name="dinov2",
    family="transformers.models.dinov2.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="Dinov2Model",
            layers="encoder.layer",
            attention="attention",
            norm="norm1",
            protect_first=1,
            patches=PatchSpec(
                "Dinov2Embeddings", carrier="bool_masked_pos", fixed_size=False, always_interpolates=True
            ),
        ),
    ),
    recommended=("vision.tokens.25%",),
    averaging_heads=("Dinov2ForImageClassification",),
    heads=("Dinov2ForImageClassification", "Dinov2Model"),
)
