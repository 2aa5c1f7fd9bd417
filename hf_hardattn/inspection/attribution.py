"""Scores of every position by several explanations of the same answer: the selector's own scores and those they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import HardAttentionError, missing_extra
from ..losses.distillation import teach
from ..models import family_of
from ..recording import record
from .perturbation import PerturbationEvaluator


def selection(evaluator: PerturbationEvaluator, site: str | None = None) -> Tensor:
    """Return the selector's own scores, mean over heads and queries, fp32 ``[B, P]``; positions that earlier sites dropped rank last."""
    with torch.no_grad(), record(evaluator.model) as recording:
        evaluator.model(**evaluator.batch)
    chosen = recording[
        site or next((s for s in recording.sites if recording.tower(s) == evaluator.tower), evaluator.site)
    ][0]
    kept = recording.kept(chosen).flatten(1, 2).float().mean(1)
    if chosen.scores.shape[-1] != evaluator.places.shape[1]:
        return kept.expand(evaluator.places.shape)
    scores = chosen.scores.float().flatten(1, 2).mean(1)
    scale = (scores.amax(-1, keepdim=True) - scores.amin(-1, keepdim=True)).clamp(min=1e-9)
    return (kept + (scores - scores.amin(-1, keepdim=True)) / (2 * scale)).expand(evaluator.places.shape)


def random(evaluator: PerturbationEvaluator, seed: int = 0) -> Tensor:
    """Return random scores, the control that every explanation must beat."""
    return torch.rand(evaluator.places.shape, generator=torch.Generator().manual_seed(seed)).to(evaluator.full)


def soft_attention(evaluator: PerturbationEvaluator) -> Tensor:
    """Return the attention of the same weights run soft. With a decoder, it is the decoder's attention to the input (mean over layers,
    heads and steps); otherwise that of CLS, of a prompt's last token, or of all tokens, in the last layer (mean over heads)."""
    teacher = teach(evaluator.model, lambda **keywords: evaluator.model(**evaluator.batch, **keywords), attention=True)
    towers = family_of(evaluator.model).towers(evaluator.model)  # type: ignore[union-attr]  # the evaluator knows the model
    cross = [
        m
        for (name, kind, _), m in teacher.attention.items()
        if kind == "cross" and towers[name].source == evaluator.tower
    ]
    if cross:
        return torch.stack(cross).mean((0, 2, 3))
    own = {
        layer: m for (name, kind, layer), m in teacher.attention.items() if (name, kind) == (evaluator.tower, "self")
    }
    last = own[max(own)].mean(1)
    if evaluator.goes_on:
        return last[:, -1]
    return last[:, 0] if evaluator.tower == "vision" else last.mean(1)


def leave_one_out(evaluator: PerturbationEvaluator) -> Tensor:
    """Return ``p(y^) - p(y^ without position i)``, fp32 ``[B, P]``, with one forward pass per position. With removal ``select`` it
    starts from the positions that the model kept. Those it dropped have exactly no effect, as nothing is left out of their row."""
    base = evaluator.own() if evaluator.removal == "select" else evaluator.places
    scores = torch.zeros_like(base, dtype=torch.float32)
    whole = evaluator(base)
    for place in base.any(0).nonzero().flatten().tolist():
        keep = base.clone()
        keep[:, place] = False
        # A row without this position is computed again, in a batch of another shape, which may be rounded differently.
        scores[:, place] = torch.where(base[:, place], whole - evaluator(keep), 0.0)
    return scores


def integrated_gradients(evaluator: PerturbationEvaluator, steps: int = 20) -> Tensor:
    """Return Captum's integrated gradients of ``p(y^)``, from a grey image or padding embeddings, summed over each patch or token.

    Source: Sundararajan, Taly & Yan 2017, arXiv:1703.01365.

    Raises:
        ImportError: captum is not installed.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise missing_extra("captum", "interpret", "a comparison with integrated gradients") from error
    inputs: Tensor
    if evaluator.tower == "vision":
        inputs, baseline, name = (
            evaluator.batch["pixel_values"],
            torch.zeros_like(evaluator.batch["pixel_values"]),
            "pixel_values",
        )
    else:
        embed, ids = evaluator.model.get_input_embeddings(), evaluator.batch["input_ids"]
        inputs, name = embed(ids).detach(), "inputs_embeds"
        baseline = embed(torch.full_like(ids, evaluator.model.config.pad_token_id or 0)).detach()
    others = {
        key: value
        for key, value in evaluator.batch.items()
        if key not in ("pixel_values", "input_ids") or evaluator.tower == "vision"
    }

    def answer(given: Tensor) -> Tensor:
        return evaluator.probability({**others, name: given})

    method = IntegratedGradients(answer)
    try:
        found = method.attribute(inputs, baselines=baseline, n_steps=steps, internal_batch_size=len(inputs))
    except NotImplementedError as error:  # T5's sequence classifier
        raise HardAttentionError(
            f"{type(evaluator.model).__name__} accepts no embeddings; integrated gradients of a text need them. Leave this method out."
        ) from error
    if evaluator.tower != "vision":
        return found.sum(-1).float()
    patch = getattr(evaluator.model.config, "vision_config", evaluator.model.config).patch_size
    tiles = torch.nn.functional.avg_pool2d(found.sum(1, keepdim=True), patch, divisor_override=1).flatten(1)
    first = evaluator.places.shape[1] - tiles.shape[1]  # CLS and registers, if there are any
    return torch.nn.functional.pad(tiles, (first, 0)).float()


EXPLANATIONS: dict[str, Callable[[PerturbationEvaluator], Any]] = {
    "selection": selection,
    "soft attention": soft_attention,
    "integrated gradients": integrated_gradients,
    "random": random,
}
