"""Mistral: layers may see a window."""

from ._llama import llama_like

MISTRAL = llama_like("mistral", "Mistral", window="sliding_window")
