"""Measure a model hard, and the same weights soft."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..modeling.context import is_soft_now
from ..modeling.selection import Selection
from ..modes import soft
from ..recording import record, selectors

# A batch to predictions, references, and the loss of each example.
Predict = Callable[[nn.Module, Any], tuple[list[Any], list[Any], list[float]]]
Score = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


def measure(accelerator: Accelerator, model: nn.Module, loader: Any, predict: Predict, score: Score) -> dict[str, Any]:
    """Evaluate ``model`` as it is over all processes; each example counts once.

    Returns:
        the scores, ``loss``, ``examples``, and for a hard model ``kept_ratio`` by site (share of the candidates that were
        computed on, mean over rows).
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
    """``measure`` the model hard and soft; a model without hard attention soft only."""
    inner = accelerator.unwrap_model(model)
    found = {"hard": measure(accelerator, model, *how)} if selectors(inner) else {}
    with soft(inner):
        return {**found, "soft": measure(accelerator, model, *how)}
