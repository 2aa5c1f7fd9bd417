"""Faithfulness, plausibility and agreement as modules of Hugging Face ``evaluate``; each has its own file, loaded by path, offline.

>>> import evaluate, hf_hardattn.metrics as metrics                                # doctest: +SKIP
>>> f1 = evaluate.load(metrics.path("rationale_f1"))                               # doctest: +SKIP
>>> evaluate.combine([f1, evaluate.load(metrics.path("rationale_iou"))])           # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path

from ..errors import unknown

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all metrics."""
    return sorted(file.stem for file in _FOLDER.glob("[!_]*.py"))


def path(name: str) -> str:
    """Return the path of the module ``name``, for ``evaluate.load``."""
    if name not in names():
        raise unknown("metric", name, names())
    return str(_FOLDER / f"{name}.py")
