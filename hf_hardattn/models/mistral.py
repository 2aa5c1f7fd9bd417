"""Mistral: layers may have a sliding window."""

from ._llama import llama_like

MISTRAL = llama_like("mistral", "Mistral", window="sliding_window")
