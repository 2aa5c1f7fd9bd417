"""Add what lies outside docs/ to the site: the pictures of results/ and the repository's own pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("kept_patches.png", "needle.png", "photo.png")
PAGES = ("CHANGELOG.md", "MIGRATION.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, config: Any) -> Files:
    for picture in PICTURES:
        path = str(ROOT / "results" / picture)
        files.append(File.generated(config, f"assets/results/{picture}", abs_src_path=path))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text)  # links as they are on the repository's page
        files.append(File.generated(config, page.lower(), content=text))
    return files
