"""Summarise documents."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import flag
from ._texts import TextArguments, TextToText


@dataclass(kw_only=True)
class SummaryArguments(TextArguments):
    """Flags of summarisation: ROUGE as the metric, and the prefix that T5 was pretrained with."""

    source_prefix: str = flag("summarize: ", "Text to put before each input.")
    metrics: list[str] = flag(["rouge"], "rouge | bleu (with chrF) | cider")


class Summarisation(TextToText):
    """A document column and a summary column."""

    Arguments = SummaryArguments
    sources = ("document", "article", "text", "source")
    targets = ("summary", "highlights", "target")
