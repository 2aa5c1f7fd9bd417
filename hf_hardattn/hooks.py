"""What a hard model does around its forward: it hands its towers a ``Pass``, and adds the estimators' terms to ``outputs.loss``."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import architecture_of
from .errors import HardAttentionError
from .losses import auxiliary_loss
from .recording import selectors
from .selection import Selection
from .sites import PASS
from .stream import Pass


class OpenPass:
    """Forward pre-hook of a hard model: hands the towers a ``Pass`` by keyword. A tuple that the caller asked for is made by
    ``ClosePass``, which reads the outputs by name."""

    def __init__(self, shares_gates: bool):
        self.shares_gates = shares_gates

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        by_name = kwargs.get("return_dict", getattr(model.config, "return_dict", True))
        if by_name is False and model.training:
            kwargs = {**kwargs, "return_dict": True}
        return args, {**kwargs, PASS: Pass(shares_gates=self.shares_gates, as_tuple=by_name is False)}


class ClosePass:
    """Forward hook of a hard model: in training mode adds the estimators' terms to ``outputs.loss``."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        record: Pass = kwargs[PASS]
        if not model.training:
            return output
        if record.selections:
            _add_terms(model, args, kwargs, output, record.selections)
        return output.to_tuple() if record.as_tuple else output


def _add_terms(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, selections: list[Selection]
) -> None:
    by_site = selectors(model)
    inputs = _named(model, args, {name: value for name, value in kwargs.items() if name != PASS})
    loss = output.get("loss")
    needs_reward = any(s.log_prob is not None for s in selections)
    if loss is None:
        if needs_reward:
            warnings.warn(
                f"{type(model).__name__} returned no loss, so the score-function estimators of its sites got no reward and do not train. "
                "Pass labels, or add hf_hardattn.auxiliary_loss(selections, hf_hardattn.selectors(model), reward) to your loss.",
                stacklevel=2,
            )
        return
    reward = _reward(model, inputs, output, loss) if needs_reward else None
    greedy = None
    if needs_reward and any(s.baseline is not None and s.baseline.needs_greedy for s in by_site.values()):
        greedy = _greedy_reward(model, inputs, args, kwargs)
    extra = auxiliary_loss(selections, by_site, reward, greedy)
    if extra is not None:
        output["loss"] = loss + (extra * _share(model, inputs)).to(loss.dtype)


def _share(model: nn.Module, inputs: dict[str, Any]) -> Tensor | float:
    """This batch's share of an accumulated one. The Trainer asks for a loss summed and divided by the items of all
    micro-batches; where the model obeys, the terms must follow, or they would weigh more with every micro-batch."""
    total, architecture = inputs.get("num_items_in_batch"), architecture_of(model)
    items = None if total is None or architecture is None else architecture.loss_items(model, inputs)
    return 1.0 if items is None else items / torch.as_tensor(total, device=items.device).flatten()[0]


def _reward(model: nn.Module, inputs: dict[str, Any], output: Any, loss: Tensor) -> Tensor:
    """Reward of each example ``[B]``, or of the batch ``[]`` where the output does not tell."""
    custom = model.__dict__.get("_hard_attention_reward")
    with torch.no_grad():
        if custom is not None:
            reward = torch.as_tensor(custom(inputs, output), dtype=torch.float32, device=loss.device)
            if reward.dim() != 1:
                raise HardAttentionError(
                    f"the reward function returned shape {tuple(reward.shape)}; it must give one number per example, [B]."
                )
            return reward
        architecture = architecture_of(model)
        losses = None if architecture is None else architecture.example_loss(model, inputs, output)
        return -(loss if losses is None else losses).detach().float()


def _greedy_reward(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Reward of the deterministic choices: the same forward in evaluation mode, without gradient."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output = model.forward(*args, **{**kwargs, PASS: Pass()})
    finally:
        for module, training in modes:
            module.training = training
    return _reward(model, inputs, output, output["loss"])


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
