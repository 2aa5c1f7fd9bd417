"""Escape text for Markdown: everything in a record is shown as text, never interpreted as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from .record import missing

_ANYWHERE = re.compile(r"[|\[\]`~*\\]|(?<![^\W_])_|_(?![^\W_])")
_AT_THE_START = re.compile(r"^(\d{0,9})([#+=.)-])(?=[#=\s-]|$)")  # heading, rule, list, numbered list


def plain(value: Any) -> str:
    """Return one line of text in which HTML, links, tables, code, emphasis, headings, lists and fences are escaped. A list is joined."""
    value = ", ".join(map(str, value)) if isinstance(value, list) else value
    text = html.escape(" ".join(str(value).split()), quote=False)
    text = _ANYWHERE.sub(lambda match: f"&#{ord(match[0])};", text)
    return _AT_THE_START.sub(lambda match: f"{match[1]}&#{ord(match[2])};", text)


def code(value: Any) -> str:
    """Return one line as a code span, without backticks and bars, which a span in a table cannot contain."""
    return f"`{' '.join(str(value).split()).replace('`', '').replace('|', '/')}`"


def block(text: str, language: str) -> str:
    """Return a fenced block; a fence inside is broken up."""
    return f"```{language}\n{text.replace('```', '` ` `').rstrip()}\n```"


def number(value: Any, pattern: str = ",.4g") -> str:
    """Format a measured number, or say that it was not measured and why."""
    why = missing(value)
    return format(value, pattern) if why is None else f"not measured ({plain(why)})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table from cells that are already Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def facts(values: dict[str, Any]) -> str:
    """Return a two-column table of names and values."""
    return table(("", ""), [(plain(key), plain(value)) for key, value in values.items()])


def bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {plain(item)}" for item in items)
