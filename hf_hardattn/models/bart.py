"""BART."""

from ._bart import bart_like

BART = bart_like("bart", "Bart", norm=None, encoder={"protect_last": True})
