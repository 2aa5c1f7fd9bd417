"""Write a model card from its record; every number in the card was written by a command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..errors import HardAttentionError
from . import card_sections as sections
from .card_metadata import metadata
from .markdown import plain
from .record import check_record, read_record

CARD, RECORD, SOURCE, PICTURES = "README.md", "card.json", "source.json", "images"
NOTE = "<!-- written by 'hf-hardattn card'"
SECTIONS = (
    sections.behaviour,
    sections.start,
    sections.selection,
    sections.quality,
    sections.efficiency,
    sections.faithfulness,
    sections.subgroups,
    sections.governance,
    sections.energy,
    sections.transparency,
    sections.reproduce,
)
_PICTURE = re.compile(r"(.*/)?[\w.-]+\.(png|jpg|jpeg)")
_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")


def render(record: dict[str, Any]) -> ModelCard:
    """Create the card of a complete record.

    Raises:
        HardAttentionError: see ``check_record``; or a name of a repository or picture is invalid.
    """
    check_record(record, str(record.get("name", "the card"))[:100])
    for name in (record["repo_id"], record["base"]["model"]):
        if not _MODEL.fullmatch(name):
            raise HardAttentionError(f"{name[:100]!r} is not the name of a repository; a name is 'user/name'.")
    for picture in record["pictures"]:
        if not _PICTURE.fullmatch(picture["file"]):
            raise HardAttentionError(f"{picture['file'][:100]!r} is not a picture file; use a .png or .jpg.")
    base = "" if record["base"]["model"] == "none" else f" Base model: {plain(record['base']['model'])}."
    parts = [f"# {plain(record['name'])}", f"{plain(record['summary'])}{base}", sections.pictures(record)]
    body = "\n\n".join([part for part in parts if part] + [section(record) for section in SECTIONS])
    note = f"{NOTE} from {RECORD}; do not edit -->"
    return ModelCard(f"---\n{metadata(record).to_yaml()}\n---\n\n{note}\n\n{body}\n")


def write_card(source: Path, folder: Path | None = None) -> Path:
    """Write ``README.md``, the resolved record ``card.json``, and the pictures.

    Args:
        source: the record, with references to results JSON. folder: output folder; that of the source by default.

    Returns:
        The path of the card.

    Raises:
        HardAttentionError: a number is missing or was written by hand, or a picture does not exist. Nothing is written then.
    """
    folder = folder or source.parent
    record = read_record(source)
    card = render(record)
    pictures = [source.parent / picture["file"] for picture in record["pictures"]]
    for picture in pictures:
        if not picture.is_file():
            raise HardAttentionError(
                f"{picture} does not exist; the card of {record['name']} shows it. Run the command that draws it."
            )
    write_record(record, card, folder)
    for picture in pictures:
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / PICTURES / picture.name)
    return folder / CARD


def refuse_foreign_card(folder: Path) -> None:
    """Raise for a README.md that was written neither by this command nor from PEFT's template.

    Raises:
        HardAttentionError: the README.md has another author.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.strip() and NOTE not in text and "[More Information Needed]" not in text:
        raise HardAttentionError(
            f"{path} was not written by this command; existing files are not overwritten by default. Move it, add --overwrite, or use another --output."
        )


def write_record(record: dict[str, Any], card: ModelCard, folder: Path) -> None:
    """Write the record and its card."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card.save(folder / CARD)
