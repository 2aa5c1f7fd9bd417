"""Add files outside docs/ to the site: the pictures of results/ and the pages in the root of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PICTURE = re.compile(r"\]\((?:\.\./)*assets/results/([\w.]+)\)")
PAGES = ("CHANGELOG.md", "MIGRATION.md", "CONTRIBUTING.md", "SECURITY.md")


LANDING = ("families.md", "what_happens.md")  # in the navigation only if they exist


def on_config(config: Any) -> Any:
    config["nav"] = _without_missing(config["nav"])
    return config


def _without_missing(nav: list[Any]) -> list[Any]:
    kept = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _without_missing(target)})
        elif target not in LANDING or (ROOT / "docs" / target).exists():
            kept.append(entry)
    return kept


def on_files(files: Files, config: Any) -> Files:
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))]
    for picture in sorted({name for page in pages for name in PICTURE.findall(page)}):
        path = ROOT / "results" / picture
        if not path.is_file():
            raise PluginError(f"a page shows {picture}, which is not in results/.")
        files.append(File.generated(config, f"assets/results/{picture}", abs_src_path=str(path)))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text)  # these pages link relative to the root of the repository
        files.append(File.generated(config, page.lower(), content=text))
    return files
