"""Write the tables of the README and of the documentation from results/, so that every number in them was written by a command.

python scripts/docs/render.py            # rewrite README.md and docs/
python scripts/docs/render.py --check    # fail if a page would change

The text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is the result of ``table()`` in ``scripts/docs/tables/NAME.py``, and the text
between ``<!-- NAME.PART -->`` and its end marker is that of the function ``PART()``. Two pages are also written as notebooks.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {"quicktour.md": "quicktour.ipynb", "tutorials/auditing.md": "auditing.ipynb"}
FENCED = re.compile(r"^```(\w+)\n(.*?)^```\n?", flags=re.S | re.M)
MARKED = re.compile(r"<!-- ([\w.]+) -->\n.*?<!-- /\1 -->", flags=re.S)
REPOSITORY_LINK = re.compile(r"\]\((results/[^)]+)\)")


def render(text: str, depth: int) -> str:
    """Return a page with the tables between its markers rewritten.

    Args:
        depth: number of folders between the root of the repository and the page; links to ``results/`` are relative to the page.
    """

    def anew(marked: re.Match[str]) -> str:
        name, _, part = marked[1].partition(".")
        table = getattr(import_module(f"tables.{name}"), part or "table")()
        table = REPOSITORY_LINK.sub(lambda link: f"]({'../' * depth}{link[1]})", table)
        return f"<!-- {marked[1]} -->\n{table}\n<!-- /{marked[1]} -->"

    return MARKED.sub(anew, text)


def notebook(page: str) -> str:
    """Return a page as a notebook: its text and its Python blocks, without their outputs."""
    cells: list[dict[str, object]] = []
    end = 0
    for block in FENCED.finditer(page):
        if block[1] in ("python", "text"):
            cells.append(_cell("markdown", page[end : block.start()]))
            end = block.end()
        if block[1] == "python":
            cells.append({**_cell("code", block[2]), "execution_count": None, "outputs": []})
    cells.append(_cell("markdown", page[end:]))
    kept = [cell | {"id": f"cell-{number}"} for number, cell in enumerate(c for c in cells if c["source"])]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": kept, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def _cell(kind: str, text: str) -> dict[str, object]:
    return {"cell_type": kind, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}


def pages() -> list[Path]:
    """Return the README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    wanted = {page: render(page.read_text("utf-8"), len(page.relative_to(ROOT).parts) - 1) for page in pages()}
    for page, name in NOTEBOOKS.items():
        wanted[ROOT / "docs" / "notebooks" / name] = notebook(wanted[ROOT / "docs" / page])
    stale = []
    for page, new in wanted.items():
        if not page.exists() or page.read_text(encoding="utf-8") != new:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.parent.mkdir(exist_ok=True)
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(stale)}: not what results/ says; run: python scripts/docs/render.py")


if __name__ == "__main__":
    main()
