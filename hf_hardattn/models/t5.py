"""T5: all layers share the position bias of the first layer."""

from ._t5 import ATTENTION, t5_like

T5 = t5_like("t5", "T5", ATTENTION)
