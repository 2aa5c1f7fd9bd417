"""Gemma."""

from ._llama import llama_like

GEMMA = llama_like("gemma", "Gemma")
