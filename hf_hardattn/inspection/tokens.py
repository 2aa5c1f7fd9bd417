"""A text with its kept tokens marked, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..recording import Recording
from .html import TOKENS, Html
from .rationale import character_spans, kept_places


def token_highlight(
    recording: Recording, text: str, offsets: Sequence[tuple[int, int]], site: str | None = None, row: int = 0
) -> Html:
    """Show ``text`` with the kept tokens marked and the dropped ones faint and struck through.

    No part of the text can be executed: every character is escaped, and there is no script. The marks differ in background, weight
    and lines, not in colour alone, and use the text colour of the page, so that they are readable in light and dark themes.

    Args:
        recording: of one forward pass. text: of ``row``. offsets: (start, end) of each token in ``text``.
        site: of the encoder; the first in the recording by default.
    """
    kept = kept_places(recording, site or recording.sites[0])
    spans = character_spans(kept[min(row, len(kept) - 1)], offsets)
    read = max((end for _, end in offsets), default=0)
    rest = (
        f"{len(text) - read} characters after these were cut off before the model read the text."
        if text[read:].strip()
        else ""
    )
    note = f'<p class="note">{rest}</p>' if rest else ""
    return Html(f"<style>{TOKENS}</style>{mark_spans(text[:read], spans)}{note}")


def mark_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Return ``text``, escaped, with the characters in ``spans`` (ascending, disjoint) in ``<mark>`` and the others in ``<s>``."""
    parts, end = [], 0
    for start, stop in [*spans, (len(text), len(text))]:
        gap = text[end:start]
        if gap.strip():
            parts.append(f"<s>{escape(gap)}</s>")
        else:
            parts.append(escape(gap))
        if start < stop:
            parts.append(f"<mark>{escape(text[start:stop])}</mark>")
        end = stop
    return f'<p class="hfha">{"".join(parts)}</p>'
