"""The task loss label by label, and how the model made ``outputs.loss`` of it, which is measured because heads differ."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..models import family_of

_EXPLAINED = "hard_attention_explained"  # attribute of a model: whether its loss is that of its labels, as found in the first call


@torch.no_grad()
def share_of_batch(model: nn.Module, inputs: dict[str, Any], output: Any, loss: Tensor) -> Tensor | float:
    """Return the share of this micro-batch in an accumulated batch, fp32 ``[]``; 1.0 if the model returns a mean.

    The Trainer requests a loss that is summed and then divided by the items of all micro-batches. Where the model does so, whatever joins
    or replaces its loss must as well, or its weight would grow with every micro-batch.

    Args:
        loss: what the model returned, a scalar. Of the sum divided by the items, and the mean, it is the one that is nearer.
    """
    given, family = inputs.get("num_items_in_batch"), family_of(model)
    found = None if given is None or family is None else family.token_loss(model, inputs, output)
    if found is None:
        return 1.0
    losses, counted = found
    summed, items = (losses * counted).sum(), counted.sum()
    total = torch.as_tensor(given, device=items.device).flatten()[0]
    divided = (loss - summed / total).abs() <= (loss - summed / items.clamp(min=1)).abs()
    return torch.where(divided, items / total, 1.0)


@torch.no_grad()
def explained(model: nn.Module, inputs: dict[str, Any], output: Any, loss: Tensor) -> bool:
    """Return whether the losses of the labels make up the model's own loss; a head that is not known, or weighs classes, has another.

    It is measured in the first call that is neither compiled nor transformed, since it reads a number.

    Args:
        loss: what the model returned, a scalar.
    """
    known: bool | None = getattr(model, _EXPLAINED, None)
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad ...
    if known is not None or traced or loss.is_meta:
        return known is not False
    family = family_of(model)
    found = None if family is None else family.token_loss(model, inputs, output)
    if found is None:
        return True
    losses, counted = found
    summed, total = (losses * counted).sum(), inputs.get("num_items_in_batch")
    mean = summed / counted.sum().clamp(min=1)
    expected = [mean] if total is None else [mean, summed / torch.as_tensor(total, device=summed.device).flatten()[0]]
    tolerance = torch.finfo(loss.dtype).eps ** 0.5
    same = any(torch.allclose(loss.float(), value, rtol=tolerance, atol=tolerance) for value in expected)
    model.__dict__[_EXPLAINED] = same = same or not bool(loss.isfinite())
    return same


@torch.no_grad()
def reward_of(model: nn.Module, inputs: dict[str, Any], output: Any, loss: Tensor) -> Tensor:
    """Return the reward of each example ``[B]``, or of the batch ``[]`` if the loss of each example is not known.

    Args:
        loss: what the model returned, a scalar.

    Raises:
        HardAttentionError: the reward function returned something else than one number per example.
    """
    # Read as an attribute and not through __dict__, since compiled code only guards attributes.
    custom = getattr(model, "_hard_attention_reward", None)
    if custom is not None:
        given = custom(inputs, output)
        reward = None if given is None else torch.as_tensor(given, dtype=torch.float32, device=loss.device)
        if reward is None or reward.dim() != 1:
            what = "None" if reward is None else f"shape {tuple(reward.shape)}"
            raise HardAttentionError(f"the reward function returned {what}; it must give one number per example, [B].")
        return reward
    family = family_of(model)
    losses = None if family is None else family.example_loss(model, inputs, output)
    if losses is not None and not explained(model, inputs, output, loss):
        losses = None
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"the loss of {type(model).__name__} is not the mean loss of its labels, so the reward of each example is not known: all get "
                "minus the loss of the batch, which learns with more variance. Give the reward of each example with hf_hardattn.set_reward.",
                stacklevel=2,
            )
    return -(loss if losses is None else losses).detach().float()
