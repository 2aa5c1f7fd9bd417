"""Check a card, for example in CI: it must be complete and traceable, declare its validation, and have a compatible licence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..errors import HardAttentionError
from .card import CARD, RECORD, SOURCE, render
from .licences import conflict
from .record import check_record, read_record
from .secrets import holds_token
from .untrusted import read_json

EDITED = f"{CARD} does not match {RECORD}"


def check_card(folder: Path) -> list[str]:
    """List the problems of the card in a folder; empty if there are none.

    The checks: README.md, card.json and source.json (if it exists) agree; every number comes from the results files that the record
    names, which are unchanged since; external validation is declared or its absence stated; the licence is compatible with that of
    the base model; there is no access token.
    """
    try:
        return list(_problems(folder))
    except HardAttentionError as error:
        return [str(error)]


def _problems(folder: Path) -> Iterator[str]:
    for name in (CARD, RECORD):
        if not (folder / name).is_file():
            yield f"{name} is missing; write both with: hf-hardattn card {SOURCE}"
            return
    record = read_json(folder / RECORD, str(folder))
    check_record(record, str(folder / RECORD))
    text = (folder / CARD).read_text(encoding="utf-8")
    if text != str(render(record)):
        yield f"{EDITED}; a card must not be edited by hand. Write it again: hf-hardattn card"
    if (folder / SOURCE).is_file() and read_record(folder / SOURCE) != record:
        yield f"{RECORD} does not match {SOURCE} and the current results. Write it again: hf-hardattn card"
    yield from _sources(folder, record)
    yield from _metadata(text, record)
    if problem := conflict(record["license"], record["base"]["license"]):
        yield problem
    for path in (folder / CARD, folder / RECORD, folder / SOURCE):
        if path.is_file() and holds_token(path):
            yield f"{path.name} holds an access token; remove it and revoke it."


def _sources(folder: Path, record: dict[str, Any]) -> Iterator[str]:
    for name, digest in record["sources"].items():
        path = folder / str(name)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield f"{name} changed since the card was written. Write it again: hf-hardattn card"


def _metadata(text: str, record: dict[str, Any]) -> Iterator[str]:
    try:
        data: Any = ModelCard(text).data
    except Exception as error:  # noqa: BLE001 - YAML and model-index, read by huggingface_hub
        yield f"the metadata of {CARD} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        return
    if data.get("library_name") != "hf-hardattn":
        yield f"library_name={data.get('library_name')!r}; it must be hf-hardattn, the library that loads the model hard."
    if data.get("license") != record["license"]:
        yield f"license={data.get('license')!r} in the metadata; the record says {record['license']!r}."
    if not data.eval_results:
        yield "the metadata has no model-index; a card without a result is not checked."
