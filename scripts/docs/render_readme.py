"""Write the README's tables from results/, so that every number in it was made by a command.

python scripts/docs/render_readme.py            # rewrite README.md
python scripts/docs/render_readme.py --check    # fail if it would change

The text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is what ``table()`` of ``scripts/docs/readme/NAME.py`` says.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def render(text: str) -> str:
    """README text with each table between its markers made anew."""

    def anew(marked: re.Match[str]) -> str:
        name = marked[1]
        return f"<!-- {name} -->\n{import_module(f'readme.{name}').table()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", anew, text, flags=re.S)


def main() -> None:
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is not what results/ says; run: python scripts/docs/render_readme.py" if new != old else 0)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
