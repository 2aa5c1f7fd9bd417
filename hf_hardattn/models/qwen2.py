"""Qwen2."""

from ._llama import llama_like

QWEN2 = llama_like("qwen2", "Qwen2")
