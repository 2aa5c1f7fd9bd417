"""Llama."""

from ._llama import llama_like

LLAMA = llama_like("llama", "Llama")
