"""Text into Markdown, safely: whatever a record says is shown, none of it is markup."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from .record import missing


def plain(value: Any) -> str:
    """One line of text; HTML, links, tables and code in it lose their meaning."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    for sign, entity in (("|", "&#124;"), ("[", "&#91;"), ("]", "&#93;"), ("`", "&#96;")):
        text = text.replace(sign, entity)
    return text


def code(value: Any) -> str:
    """One line as a code span; backticks and bars in it are taken out, since a span cannot hold them in a table."""
    return f"`{' '.join(str(value).split()).replace('`', '').replace('|', '/')}`"


def block(text: str, language: str) -> str:
    """A fenced block; a fence inside is taken apart."""
    return f"```{language}\n{text.replace('```', '` ` `').rstrip()}\n```"


def number(value: Any, pattern: str = ",.4g") -> str:
    """A measured number, or that it was not measured, and why."""
    why = missing(value)
    return format(value, pattern) if why is None else f"not measured ({plain(why)})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def facts(values: dict[str, Any]) -> str:
    """A two-column table of names to values."""
    return table(("", ""), [(plain(key), plain(value)) for key, value in values.items()])


def bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {plain(item)}" for item in items)
