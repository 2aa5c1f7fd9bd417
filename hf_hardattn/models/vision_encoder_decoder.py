"""An image encoder whose output a text decoder reads."""

from ..modeling.spec import TowerSpec
from ._reading import reading

VISION_ENCODER_DECODER = reading(
    "vision_encoder_decoder", TowerSpec("vision", module="ViTModel", layers="layers", inputs="pixel_values")
)
