"""Does an explanation depend on what the model learned? Shuffle its weights and compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..modes import evaluating
from ..recording import record
from .agreement import jaccard


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy with the entries of every weight permuted: the same numbers, but nothing learned."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copied


@torch.no_grad()
def randomised_weights(model: nn.Module, batch: Mapping[str, Any], seeds: int = 3) -> dict[str, dict[str, float]]:
    """Compare what a model keeps with what it keeps after its weights were shuffled.

    Args:
        seeds: number of shuffles to average over.

    Returns:
        maps a site to ``jaccard`` with the shuffled model, and to ``chance``, that of two random choices of as many places. An
        agreement far above chance means that the selection does not need what was learned: the statistics of the input or its
        positions decide, and the selection explains nothing about this model.

    Source: Adebayo et al. 2018, "Sanity Checks for Saliency Maps", arXiv:1810.03292.
    """
    with evaluating(model), record(model) as mine:
        model(**batch)
    found: dict[str, dict[str, float]] = {}
    for seed in range(seeds):
        other = shuffled(model, seed).eval()
        with record(other) as theirs:
            other(**batch)
        for site, values in jaccard(mine, theirs).items():
            for name, value in values.items():
                row = found.setdefault(site, {})
                row[name] = row.get(name, 0.0) + value / seeds
    return found
