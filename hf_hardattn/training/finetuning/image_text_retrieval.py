"""Find texts by images and images by texts."""

from __future__ import annotations

from ._retrieval import RetrievalTask


class ImageTextRetrieval(RetrievalTask):
    """An image column and a text column."""
