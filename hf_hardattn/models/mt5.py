"""mT5."""

from ._t5 import ATTENTION, t5_like

MT5 = t5_like("mt5", "MT5", ATTENTION)
