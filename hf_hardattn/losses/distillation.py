"""The soft teacher: the same weights with full attention, for the estimator ``distil`` and for self-distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import HardAttentionError
from ..functional.topk import mask_to_indices
from ..modeling.selection import Selection
from ..modeling.selector import Selector
from ..models import family_of
from ..modes import evaluating, soft
from ..recording import Recording


@dataclass
class Teacher:
    """The result of a soft forward pass.

    Attributes:
        output: output of the model.
        attention: maps ``(tower, kind, layer)`` to weights ``[B, H, Q, N]``.
    """

    output: Any
    attention: dict[tuple[str, str, int], Tensor]


@torch.no_grad()
def teach(model: nn.Module, forward: Callable[..., Any], attention: bool) -> Teacher:
    """Run ``forward`` soft, in evaluation mode, without gradient.

    Args:
        attention: also collect the attention weights of every layer; the model then uses eager attention.
    """
    seen: dict[tuple[str, str, int], Tensor] = {}
    with evaluating(model), soft(model):
        if not attention:
            return Teacher(forward(), seen)
        with _weights(model, seen):
            return Teacher(forward(output_attentions=True), seen)


@contextmanager
def _weights(model: nn.Module, seen: dict[tuple[str, str, int], Tensor]) -> Iterator[None]:
    """Make every attention module return its weights, and collect them in ``seen``."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    handles = []
    family = family_of(model)
    for name, tower in {} if family is None else family.towers(model).items():
        for kind in {"self", "cross"} & set(tower.kinds):
            for layer, block in enumerate(tower.layers):

                def keep(module: nn.Module, args: Any, output: Any, key: Any = (name, kind, layer)) -> None:
                    if output[-1] is None:
                        raise HardAttentionError(
                            f"estimator 'distil' reads attention weights, which {type(model).__name__} does not return; let its "
                            "forward accept output_attentions, or use another estimator."
                        )
                    seen[key] = output[-1].detach().float()

                handles.append(tower.attention(block, kind).register_forward_hook(keep))
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config, implementation in before:
            config._attn_implementation = implementation


def attention_at(teacher: Teacher, made: Recording, selection: Selection, per_query: bool) -> Tensor:
    """Return the teacher's attention to the candidates of a selection, fp32, broadcastable to ``[B, H, Q, N]``, not normalised.

    At ``self`` and ``cross`` sites it is the attention of the layer itself; at ``tokens`` and ``inputs`` sites it is the attention
    that each position receives in the layers that follow. It is a mean over heads and queries that share a choice. ``made``: the
    selections of the same pass.
    """
    tower, kind, *rest = selection.site.split(".")
    layer = int(rest[0]) if rest else -1
    if kind in ("self", "cross"):
        weights = teacher.attention[tower, kind, layer]
    else:
        maps = {at: m for (name, what, at), m in teacher.attention.items() if (name, what) == (tower, "self")}
        following = [m for at, m in maps.items() if at > layer] or [maps[max(maps)]]
        weights = torch.stack([m.mean((1, 2), keepdim=True) for m in following]).mean(0)
    if selection.mask.shape[1] == 1:
        weights = weights.mean(1, keepdim=True)
    if not per_query:
        weights = weights.mean(2, keepdim=True)
    if weights.shape[-1] != selection.mask.shape[-1]:  # earlier sites dropped rows; the others keep their order
        left = made.candidates(selection).flatten(1, 2).any(1)
        places = mask_to_indices(left, selection.mask.shape[-1])[:, None, None].expand(-1, *weights.shape[1:3], -1)
        weights = weights.gather(-1, places)
    return weights


def attention_loss(teacher: Teacher, made: Recording, selection: Selection, selector: Selector) -> Tensor:
    """Return ``weight * KL(attention || softmax(scores / temperature))`` over the candidates, a mean over rows with candidates."""
    candidates = selection.valid if selection.protected is None else selection.valid & ~selection.protected
    paid = attention_at(teacher, made, selection, per_query=selection.scores.shape[2] > 1 and not selector.once)
    paid = torch.where(candidates, paid, 0.0)
    paid = paid / paid.sum(-1, keepdim=True).clamp(min=1e-9)
    scores = (selection.scores / selector.now(selector.temperature)).masked_fill(~candidates, -1e30)
    divergence = torch.where(candidates, torch.xlogy(paid, paid) - paid * scores.log_softmax(-1), 0.0).sum(-1)
    rows = candidates.any(-1)
    return selector.estimator.weight * (divergence * rows).sum() / rows.sum().clamp(min=1)


def prediction_loss(teacher: Teacher, output: Any, labels: Tensor | None) -> Tensor:
    """Return ``KL(soft model || hard model)``, a mean over examples or labels, and over the predictions of a model that has several.

    A prediction is a field of the output with ``logits`` in its name: ``logits``, ``start_logits``, ``logits_per_image`` ...

    Raises:
        HardAttentionError: the output has no such field.

    Source: DynamicViT (Rao et al., 2021), equation 19.
    """
    fields = [name for name, value in output.items() if "logits" in name and isinstance(value, Tensor)]
    if not fields:
        raise HardAttentionError(
            f"self_distillation compares logits, which {type(output).__name__} does not have; it has: {', '.join(output)}. "
            "Set self_distillation=0, or use estimator 'distil', which compares attention."
        )
    return torch.stack([_divergence(teacher.output[name], output[name], labels) for name in fields]).mean()


def _divergence(soft_logits: Tensor, hard_logits: Tensor, labels: Tensor | None) -> Tensor:
    known, hard = soft_logits.float().log_softmax(-1), hard_logits.float().log_softmax(-1)
    divergence = (known.exp() * (known - hard)).sum(-1)
    if labels is None or labels.numel() != divergence.numel():
        return divergence.mean()
    counted = (labels != -100).view(divergence.shape)
    return (divergence * counted).sum() / counted.sum().clamp(min=1)
