"""Write the tables of the README and of the documentation from results/, so that every number in them was made by a command.

python scripts/docs/render.py            # rewrite README.md and docs/
python scripts/docs/render.py --check    # fail if a page would change

The text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is what ``table()`` of ``scripts/docs/tables/NAME.py`` returns, and the text
between ``<!-- NAME.PART -->`` and its end is what its function ``PART()`` returns.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"<!-- ([\w.]+) -->\n.*?<!-- /\1 -->", flags=re.S)
REPOSITORY_LINK = re.compile(r"\]\((results/[^)]+)\)")


def render(text: str, depth: int) -> str:
    """A page with each table between its markers written anew.

    Args:
        depth: folders between the page and the root of the repository; links to ``results/`` are relative to the page.
    """

    def anew(marked: re.Match[str]) -> str:
        name, _, part = marked[1].partition(".")
        table = getattr(import_module(f"tables.{name}"), part or "table")()
        table = REPOSITORY_LINK.sub(lambda link: f"]({'../' * depth}{link[1]})", table)
        return f"<!-- {marked[1]} -->\n{table}\n<!-- /{marked[1]} -->"

    return MARKED.sub(anew, text)


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    stale = []
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = render(old, len(page.relative_to(ROOT).parts) - 1)
        if new != old:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(stale)}: not what results/ says; run: python scripts/docs/render.py")


if __name__ == "__main__":
    main()
