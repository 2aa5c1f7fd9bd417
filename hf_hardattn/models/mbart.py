"""mBART."""

from ._bart import bart_like

MBART = bart_like("mbart", "MBart", norm="self_attn_layer_norm", encoder={"protect_last": True})
