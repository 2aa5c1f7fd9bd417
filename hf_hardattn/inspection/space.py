"""Write the page as a folder for a Hugging Face Space."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import HardAttentionError
from ..hub.contents import check_hard, list_files

APP = '''"""Full and hard attention side by side."""

from hf_hardattn.inspection.playground import launch

launch({models!r}, host="0.0.0.0")
'''
CARD = """---
title: Full and hard attention
colorFrom: yellow
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
tags:
- hard-attention
- interpretability
---

# Full and hard attention, side by side

The same weights, run twice: with full attention, and computing only what the model selects. Made with hf_hardattn by
`hf-hardattn demo --space`; `app.py` runs it, here or locally: `pip install -r requirements.txt gradio && python app.py`.
"""
EXTRAS = ("interpret", "plots", "vision", "text")


def write_space(folder: Path, models: Sequence[str]) -> list[str]:
    """Write a Space: ``app.py``, ``requirements.txt``, ``README.md`` with its front matter, the library, and local checkpoints.

    The library is included as source, so that the Space needs only packages from the index and, for models given by their name
    on the Hub, the Hub. Push it with ``hf upload USER/NAME FOLDER --repo-type space``.

    Args:
        folder: new or empty. models: local folders, whose weights, configurations and processors (nothing else) are copied
            into ``models/``, or names on the Hub.

    Returns:
        the names at the top level of the folder.

    Raises:
        HardAttentionError: no model, a soft model, or a folder that is not empty; a model folder that contains an access token.
    """
    if not models:
        raise HardAttentionError(
            "no model is named; a Space shows one or more hard checkpoints. Name one with --model."
        )
    if folder.exists() and any(folder.iterdir()):
        raise HardAttentionError(f"{folder} is not empty; a Space needs a folder of its own. Use a new folder.")
    local = {
        model: f"models/{number}-{Path(model).name}" for number, model in enumerate(models) if Path(model).is_dir()
    }
    files = {model: list_files(Path(model), lenient=True)[0] for model in local}  # raises before anything is written
    for model, names in files.items():
        check_hard(Path(model), names)
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).parents[1]
    shutil.copytree(source, folder / "hf_hardattn", ignore=shutil.ignore_patterns("__pycache__", "_scripts"))
    for model, place in local.items():
        for name in files[model]:
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(model) / name, folder / place / name)
    shown = [local.get(model, model) for model in models]
    (folder / "app.py").write_text(APP.format(models=shown), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    card = CARD.format(gradio=importlib.metadata.version("gradio"))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return sorted(file.name for file in folder.iterdir())


def requirements() -> list[str]:
    """Return the library's dependencies with the extras that the page needs, without Gradio, which a Space provides."""
    from packaging.requirements import Requirement

    found = set()
    for line in importlib.metadata.requires("hf-hardattn") or []:
        need = Requirement(line)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        if wanted and need.name not in ("gradio", "hf-hardattn"):
            found.add(f"{need.name}{need.specifier}")
    return sorted(found)
