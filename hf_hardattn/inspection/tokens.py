"""A text with its kept tokens lit, as HTML."""

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

    Nothing of the text can act: every character is escaped, and there is no script. Marks differ in ground, weight and line, not
    in colour alone, and take the page's own ink, so that they read in light and dark.

    Args:
        recording: of one forward. text: of ``row``. offsets: (start, end) of each token in ``text``.
        site: of the encoder; the recording's first one by default.
    """
    kept = kept_places(recording, site or recording.sites[0])
    spans = character_spans(kept[min(row, len(kept) - 1)], offsets)
    return Html(f"<style>{TOKENS}</style>{mark_spans(text, spans)}")


def mark_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """``text``, escaped, with the characters in ``spans`` (ascending, disjoint) in ``<mark>`` and the others in ``<s>``."""
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
