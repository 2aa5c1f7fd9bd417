"""UMT5: T5 in which each layer has its own position bias."""

from dataclasses import replace

from ._t5 import ATTENTION, t5_like

OWN_BIAS = replace(ATTENTION, mask="attention_mask", source="encoder_hidden_states", position_bias=False, own_bias=True)
UMT5 = t5_like("umt5", "UMT5", OWN_BIAS)
