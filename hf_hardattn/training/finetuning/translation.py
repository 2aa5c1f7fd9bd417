"""Translate a text into another language."""

from __future__ import annotations

from ._texts import TextToText


class Translation(TextToText):
    """Two columns, or one ``translation`` column of texts by language (``--source_lang en --target_lang fr``)."""

    first = "t5"
