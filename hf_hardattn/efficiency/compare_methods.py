"""Compare trained models, soft and hard, with other methods of token reduction: accuracy and measured speed of each, in one run."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification

from ..api import apply
from ..errors import HardAttentionError
from ..recording import selectors
from .bench import flops, quartiles, spread
from .competing.evit import EViT
from .competing.tome import ToMe
from .competing.topk_mask import TopKMask
from .counting import work
from .limits import profile_call
from .timing import interleaved_seconds, ratios
from .workloads import share_weights


def run(folder: Path, columns: dict[str, Any], *, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure every method on the models ``soft`` and ``hard`` of ``folder``, which share a base checkpoint. The methods without training
    are also measured at the hard model's budget.

    Args:
        columns: the test set, ``pixel_values`` and ``labels``. batch: images per timed call.

    Returns:
        For each method: accuracy, images per second, speed-up over the soft model, FLOPs per image (executed and nominal), peak bytes, and
        the weights that it uses.
    """
    missing = [name for name in ("soft", "hard") if not (folder / name).is_dir()]
    if missing:
        raise HardAttentionError(
            f"{folder} holds no {' and no '.join(map(repr, missing))} model; competing methods are compared on trained models. Run: hf-hardattn demo "
            f"--output {folder}, or train them with scripts/research/train_checkpoint.py and name their folder."
        )
    soft, hard = (AutoModelForImageClassification.from_pretrained(folder / name).eval() for name in ("soft", "hard"))
    methods = _methods(soft, hard)
    pixels, labels = columns["pixel_values"], columns["labels"]
    calls = {name: partial(_forward, model, pixels[:batch]) for name, (_, model) in methods.items()}
    timed = interleaved_seconds(calls, rounds=rounds, warmup=3)
    against = ratios(timed, "soft")
    found = {}
    for name, (weights, model) in methods.items():
        right = torch.cat([_forward(model, part).logits.argmax(-1) for part in pixels.split(250)]) == labels
        parts = work(partial(model, pixel_values=pixels[:1]))
        executed = flops(parts)
        share = getattr(model, "nominal_share", lambda n: 1.0)(1 + _patches(soft))
        found[name] = {
            "weights": weights,
            "accuracy": float(right.float().mean()),
            "images_per_second": batch / statistics.median(timed[name]),
            "against_soft": spread(against[name]),
            "seconds": {"median": statistics.median(timed[name]), "quartiles": quartiles(timed[name])},
            "flops": {"executed": executed, "nominal": executed - round((1 - share) * parts["attention"])},
            "peak_bytes": profile_call(calls[name]).peak_bytes,
        }
    return found


def _methods(soft: Any, hard: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    def chosen(scorer: str, site: str, budget: float, **options: Any) -> nn.Module:
        return apply(
            share_weights(soft), {"sites": [site], "scorer": scorer, "budget": budget, "scorer_options": options}
        ).eval()

    site, selector = next(iter(selectors(hard).items()))
    budget = selector.budget(drawing=False)
    ours = round(budget.value if budget.kind == "ratio" else budget.value / _patches(soft), 2)
    methods: dict[str, tuple[str, nn.Module]] = {"soft": ("soft", soft), f"ours, {site} keep {ours}": ("hard", hard)}
    for r in (4, 8, 12, 16, 24):
        methods[f"ToMe r={r}"] = ("soft", ToMe(soft, r).eval())
    for keep in sorted({0.7, 0.5, 0.25, ours}, reverse=True):
        methods[f"EViT after layer 0 keep {keep}"] = ("soft", EViT(soft, keep).eval())
        methods[f"random after layer 0 keep {keep}"] = ("soft", chosen("random", "vision.tokens.0", keep))
        methods[f"key norm after layer 0 keep {keep}"] = ("soft", chosen("key_norm", "vision.tokens.0", keep))
        methods[f"ours untrained (cls_attention) after layer 0 keep {keep}"] = (
            "soft",
            chosen("cls_attention", "vision.tokens.0", keep),
        )
    for keep in sorted({0.25, ours}, reverse=True):
        methods[f"per-query top-k mask keep {keep}"] = ("soft", TopKMask(soft, keep).eval())
    return methods


def _patches(model: Any) -> int:
    return int(model.config.image_size // model.config.patch_size) ** 2


def _forward(model: nn.Module, pixels: torch.Tensor) -> Any:
    with torch.inference_mode():
        return model(pixel_values=pixels)
