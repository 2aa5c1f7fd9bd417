"""The same model with a random selection of equal size: what its own selection is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.topk import topk_mask
from ..modeling.selection import Selection
from ..models import family_of
from ..modes import evaluating
from ..recording import record, replay
from ..unwrapping import unwrap


def drawn_like(selection: Selection, generator: torch.Generator) -> Selection:
    """The selection with as many positions drawn at random.

    Args:
        generator: on the CPU, so that all devices draw the same.
    """
    free = selection.valid.expand(selection.mask.shape)
    always = torch.zeros_like(free) if selection.protected is None else selection.protected.expand(free.shape)
    count = (selection.mask & ~always).sum(-1)
    noise = torch.rand(free.shape, generator=generator).to(free.device)
    return selection.replace(mask=topk_mask(noise, count, free & ~always) | (selection.mask & always))


def beside_random(model: nn.Module, batch: Mapping[str, Any], seed: int = 0) -> dict[str, float]:
    """Compare a model with itself under random selections of equal size, at all sites.

    Args:
        model: with hard attention; its mode and gradients stay as they are.
        batch: keyword inputs, with labels.
        seed: of the random selections.

    Returns:
        ``changed_by_random``: share of the answers (the likeliest label, wherever there is a label) that differ, in [0, 1]: 0 for a
        model that does not use what it selects. ``loss_over_random``: by how much the loss grows, > 0 where the selection is worth
        something. What the output does not tell is left out; empty where nothing is selected.
    """
    inner = unwrap(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), evaluating(inner):
        with record(inner) as selections:
            own = inner(**batch)
        if not selections:
            return {}
        with replay(inner, [drawn_like(selection, generator) for selection in selections]):
            random = inner(**batch)
    found = {}
    answers = [_answers(inner, batch, output) for output in (own, random)]
    if answers[0] is not None and answers[1] is not None and len(answers[0]):
        found["changed_by_random"] = (answers[0] != answers[1]).float().mean().item()
    losses = [output.get("loss") for output in (own, random)]
    if losses[0] is not None and losses[1] is not None:
        found["loss_over_random"] = (losses[1] - losses[0]).float().mean().item()
    return found


def _answers(model: nn.Module, batch: Mapping[str, Any], output: Any) -> Tensor | None:
    """The likeliest label wherever there is one, int64 ``[M]``; None where the output has no logits in line with the labels."""
    family, logits = family_of(model), output.get("logits")
    labels = None if family is None else family.labels(model, dict(batch))
    if not isinstance(logits, Tensor) or labels is None:
        return None
    likeliest = logits.argmax(-1)
    likeliest = likeliest[:, None] if likeliest.dim() == 1 else likeliest
    return likeliest[labels != -100] if likeliest.shape == labels.shape else None
