"""HTML without scripts: everything that comes from a model or a user is escaped, and a page cannot load anything."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --ground: #fff; --faint: #595959; --line: #d0d0d0; --kept: #ffe0a0; --edge: #b35900; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --ground: #16181c; --faint: #a8a8a8; --line: #44474d; --kept: #5c4300; --edge: #ffb84d; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: .5rem 0; } .wide, pre { overflow-x: auto; } th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); }
td:first-child { vertical-align: top; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; border: 1px solid var(--line); border-radius: 4px; background: #fff; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 0 2rem; }
.cards th, .cards td { padding-right: .5rem; font-size: .85rem; }
.panels { display: flex; flex-wrap: wrap; gap: 0 1.2rem; align-items: flex-start; } .panels > div { flex: 0 1 auto; max-width: 100%; }
.panels h4 { margin: .6rem 0 0; font-size: .95rem; } .panels figure { margin: .3rem 0 .6rem; }
@media (min-width: 40rem) { td:first-child { white-space: nowrap; } }
figure { margin: .8rem 0; } figcaption, .note { color: var(--faint); font-size: .92rem; }
"""
# Kept and dropped tokens differ in background, weight and strikethrough, not in colour alone. On other pages, default colours apply.
TOKENS = """
.hfha { line-height: 2; overflow-wrap: anywhere; }
.hfha mark { color: inherit; background: var(--kept, rgb(230 159 0 / .35)); font-weight: 600; border-bottom: 3px solid var(--edge, #d55e00); border-radius: 3px; padding: .05em .12em; }
.hfha s { opacity: .62; text-decoration-thickness: 1px; }
"""


class Html(str):
    """A piece of HTML, which a notebook renders. ``str(piece)`` is its source."""

    def _repr_html_(self) -> str:
        return str(self)


def page(title: str, *parts: str) -> Html:
    """Return a self-contained page, whose policy forbids scripts and all requests."""
    return Html(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}{TOKENS}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a section: a heading and its content."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def cards(parts: list[str]) -> str:
    """Return pieces side by side, as many per row as fit."""
    return '<div class="cards">' + "\n".join(f"<article>{part}</article>" for part in parts) + "</div>"


def panels(parts: list[tuple[str, str]]) -> str:
    """Return titled pieces in a row, each as wide as its content; on a narrow page they wrap to several rows."""
    return (
        '<div class="panels">'
        + "\n".join(f"<div><h4>{escape(title)}</h4>{part}</div>" for title, part in parts)
        + "</div>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Return plain text, escaped; ``kind="note"`` makes it less prominent."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Return a table; numbers are right-aligned, and everything is escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = ""
        for cell in row:
            number = isinstance(cell, (int, float))
            text = f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
            cells += f"<td{' class=number' if number else ''}>{escape(text)}</td>"
        body += f"<tr>{cells}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def picture(figure: Any, text: str, dpi: int = 90, colours: int = 128, caption: bool = True) -> str:
    """Return a matplotlib figure as an embedded PNG with few colours; ``text`` is its alternative text and its caption."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    data = base64.b64encode(small.getvalue()).decode()
    below = f"<figcaption>{escape(text)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}">{below}</figure>'
