"""SigLIP."""

from ..modeling.spec import PatchSpec, TowerSpec
from ._siglip import ATTENTION, siglip_like

VISION = TowerSpec(
    "vision",
    inputs="pixel_values",
    module="SiglipVisionModel",
    layers="encoder.layers",
    attention_spec=ATTENTION,
    norm="layer_norm1",
    pooling="head.attention",
    patches=PatchSpec(
        "SiglipVisionEmbeddings",
        projection="patch_embedding",
        positions="position_embedding",
        cls=None,
        fixed_size=False,
    ),
)
SIGLIP = siglip_like("siglip", "Siglip", VISION)
