"""Qwen3: queries and keys are normalised."""

from ._llama import llama_like

QWEN3 = llama_like("qwen3", "Qwen3", query_norm="q_norm", key_norm="k_norm")
