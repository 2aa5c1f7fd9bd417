"""T5: the position bias of the first layer serves all."""

from ._t5 import ATTENTION, t5_like

T5 = t5_like("t5", "T5", ATTENTION)
