"""Evaluate a model hard, and the same weights soft."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..errors import HardAttentionError
from ..modeling.context import is_soft_now
from ..modeling.selection import Selection
from ..modes import soft
from ..recording import record, selectors
from .results import read_json

# Maps a model and a batch to predictions, references, and the loss of each example.
Predict = Callable[[nn.Module, Any], tuple[list[Any], list[Any], list[float]]]
Score = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


def folder_of_evaluation(folder: Path, model: str, by_default: bool, overwrite: bool = False) -> Path:
    """Return the folder for the record of an evaluation.

    Args:
        folder: ``--output_dir``. model: folder or name of the model. by_default: whether the user named no folder.
        overwrite: replace an earlier evaluation; the record of a training is never replaced.

    Raises:
        HardAttentionError: the folder already holds a record.
    """
    if by_default:
        folder = Path("outputs/evaluation") / (
            Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")
        )
    record = folder / "results.json"
    if not record.is_file():
        return folder
    try:
        trained = "train" in read_json(record)
    except (ValueError, TypeError, RecursionError):
        trained = True  # unreadable: treat it as the record of a training
    if trained:
        raise HardAttentionError(
            f"--output_dir {str(folder)!r} holds the results of a training run (results.json), which an evaluation must not replace. Use another folder."
        )
    if not overwrite:
        raise HardAttentionError(
            f"{record} holds an earlier evaluation; existing files are not overwritten by default. Use another --output_dir, or add --overwrite."
        )
    return folder


def measure(accelerator: Accelerator, model: nn.Module, loader: Any, predict: Predict, score: Score) -> dict[str, Any]:
    """Evaluate ``model`` in its present mode over all processes; each example counts once.

    Returns:
        The scores, ``loss``, ``examples``, and for a hard model ``kept_ratio`` by site (share of the candidates that were
        kept, mean over rows).
    """
    inner = accelerator.unwrap_model(model)
    hard = any(not is_soft_now(selector) for selector in selectors(inner).values())
    predictions: list[Any] = []
    references: list[Any] = []
    losses: list[float] = []
    kept: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    training = model.training
    model.eval()
    for batch in tqdm(loader, desc="evaluate", leave=False, disable=not accelerator.is_local_main_process):
        watch: AbstractContextManager[list[Selection]] = record(inner) if hard else nullcontext([])
        with torch.no_grad(), accelerator.autocast(), watch as selections:
            rows = predict(model, batch)
        for selection in selections:
            ratio = selection.kept_ratio.float()
            kept[selection.site][0] += ratio.sum().item()
            kept[selection.site][1] += ratio.numel()
        for total, part in zip((predictions, references, losses), rows, strict=True):
            total += accelerator.gather_for_metrics(part, use_gather_object=True)
    model.train(training)
    row: dict[str, Any] = {**score(predictions, references), "loss": sum(losses) / max(len(losses), 1)}
    row["examples"] = len(references)
    if kept:
        totals = accelerator.reduce(torch.tensor([kept[s] for s in kept], device=accelerator.device), "sum").tolist()
        row["kept_ratio"] = {site: total / count for site, (total, count) in zip(kept, totals, strict=True)}
    return row


def compare(accelerator: Accelerator, model: nn.Module, *how: Any) -> dict[str, dict[str, Any]]:
    """``measure`` the model hard and soft; a model without hard attention only soft."""
    inner = accelerator.unwrap_model(model)
    found = {"hard": measure(accelerator, model, *how)} if selectors(inner) else {}
    with soft(inner):
        return {**found, "soft": measure(accelerator, model, *how)}
