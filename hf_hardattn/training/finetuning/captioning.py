"""Caption images."""

from __future__ import annotations

from ._captions import CaptionTask


class Captioning(CaptionTask):
    """An image column and a caption column."""

    first = "blip"
