"""The tables of the README and the documentation, a file each: the one named like its marker, whose ``table()`` reads ``results/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[3] / "results"


def read(name: str) -> Any:
    """A file of ``results/``; None where it was not made."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def spread(value: dict[str, Any], scale: float = 1.0) -> str:
    """Mean, and standard deviation where there is one."""
    text = f"{value['mean'] * scale:.1f}"
    return text if value["sd"] is None else f"{text} ± {value['sd'] * scale:.1f}"


def signed(value: dict[str, Any]) -> str:
    """The same with the sign of the mean."""
    text = f"{value['mean']:+.1f}"
    return text if value["sd"] is None else f"{text} ± {value['sd']:.1f}"


def version(results: dict[str, Any]) -> str:
    """The library that was measured; results made before 0.2.0, which replaced the way selection is put into a model, do not name it."""
    return f"hf_hardattn {results['machine'].get('hf_hardattn', '0.1.0')}"
