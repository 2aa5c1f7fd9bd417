"""The same model with random selections of equal size, to measure the value of its own selection."""

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
    """Return the selection with the same number of positions, drawn at random.

    Args:
        generator: a CPU generator, so that the draws are the same on all devices.
    """
    free = selection.valid.expand(selection.mask.shape)
    always = torch.zeros_like(free) if selection.protected is None else selection.protected.expand(free.shape)
    count = (selection.mask & ~always).sum(-1)
    noise = torch.rand(free.shape, generator=generator).to(free.device)
    return selection.replace(mask=topk_mask(noise, count, free & ~always) | (selection.mask & always))


def beside_random(model: nn.Module, batch: Mapping[str, Any], seed: int = 0) -> dict[str, float]:
    """Compare a model with itself under random selections of equal size, at all sites.

    Args:
        model: a model with hard attention; its mode and gradients are not changed.
        batch: keyword inputs, with labels.
        seed: of the random selections.

    Returns:
        ``changed_by_random``: share of the answers (the likeliest label, wherever there is a label) that differ, in [0, 1]. It is 0
        for a model that does not use its selection. ``loss_over_random``: the increase of the loss, > 0 if the selection is better
        than random. Values that the output does not provide are left out; the result is empty if nothing is selected.
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
    """Return the likeliest label wherever there is a label, int64 ``[M]``; None if the output has no logits that match the labels."""
    family, logits = family_of(model), output.get("logits")
    labels = None if family is None else family.labels(model, dict(batch))
    if not isinstance(logits, Tensor) or labels is None:
        return None
    likeliest = logits.argmax(-1)
    likeliest = likeliest[:, None] if likeliest.dim() == 1 else likeliest
    return likeliest[labels != -100] if likeliest.shape == labels.shape else None
