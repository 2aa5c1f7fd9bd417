"""A text encoder whose output a text decoder reads."""

from ..modeling.spec import TowerSpec
from ._reading import reading

ENCODER_DECODER = reading("encoder_decoder", TowerSpec("text", module="BertModel", layers="encoder.layer"))
