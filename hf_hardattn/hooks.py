"""What a hard model does around its forward: it hands its towers a ``Pass``, and adds the estimators' terms to ``outputs.loss``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import architecture_of
from .errors import HardAttentionError
from .layers import PASS
from .losses import auxiliary_loss
from .marginal import marginal_loss
from .recording import Recording, selectors
from .schedules import Schedule
from .selection import Selection
from .stream import Pass
from .teacher import attention_loss, prediction_loss, teach


class OpenPass:
    """Forward pre-hook of a hard model: hands the towers a ``Pass`` by keyword, and the selectors that need it the target. A tuple
    that the caller asked for is made by ``ClosePass``, which reads the outputs by name."""

    def __init__(self, shares_gates: bool):
        self.shares_gates = shares_gates

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        by_name = kwargs.get("return_dict", getattr(model.config, "return_dict", True))
        if by_name is False and model.training:
            kwargs = {**kwargs, "return_dict": True}
        needing = [s for s in selectors(model).values() if s.posterior is not None] if model.training else []
        if needing:
            target = _target(model, _named(model, args, kwargs))
            if target is None:
                warnings.warn(
                    f"{type(model).__name__} got no labels that an inference network could read, so estimator 'variational' draws from its "
                    "prior and learns as 'simple' does. Pass labels, or use estimator 'simple'.",
                    stacklevel=2,
                )
            for selector in needing:
                selector.target = target
        return args, {**kwargs, PASS: Pass(shares_gates=self.shares_gates, as_tuple=by_name is False)}


class ClosePass:
    """Forward hook of a hard model: in training mode adds the estimators' terms to ``outputs.loss``."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        record: Pass = kwargs[PASS]
        if not model.training:
            return output
        if record.selections:
            Step(model, args, kwargs).close(output, record)
        return output.to_tuple() if record.as_tuple else output


class Step:
    """One training forward pass of a hard model, with the further passes that its estimators ask for."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.selectors = selectors(model)
        self.inputs = _named(model, args, {name: value for name, value in kwargs.items() if name != PASS})

    def forward(self, record: Pass | None = None, **changes: Any) -> Any:
        """The model's own forward once more, past its hooks."""
        return self.model.forward(*self.args, **{**self.kwargs, **changes, PASS: record or self._record()})

    def _record(self) -> Pass:
        return Pass(shares_gates=self.kwargs[PASS].shares_gates)

    def close(self, output: Any, record: Pass) -> None:
        """Put the whole training loss into ``output``."""
        if output.get("loss") is None:
            if any({"reward", "teacher"} & set(self.selectors[s.site].estimator.needs) for s in record.selections):
                warnings.warn(
                    f"{type(self.model).__name__} returned no loss, so the score-function estimators of its sites got no reward and do not "
                    "train (nor does 'distil', which adds to it). Pass labels, or add hf_hardattn.auxiliary_loss(selections, hf_hardattn.selectors(model), reward) to your loss.",
                    stacklevel=2,
                )
            return
        exact = [s for s in record.selections if "choices" in self.selectors[s.site].estimator.needs]
        if exact:
            if len(exact) > 1:
                raise HardAttentionError(
                    f"estimator 'marginal' at {exact[0].site!r} and {exact[1].site!r}; it tries every choice of ONE site. "
                    "Name one site, or use estimator 'simple' at the others."
                )
            selector = self.selectors[exact[0].site]
            output["loss"] = marginal_loss(self.model, selector, exact[0], self.inputs, self.forward)
        passes = [(output, record.selections)]
        for _ in range(max(s.estimator.samples for s in self.selectors.values()) - 1):
            other = self._record()
            passes.append((self.forward(other), other.selections))
        losses = [found["loss"] for found, _ in passes]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        extra = self._terms(passes)
        if extra is not None:
            record.terms = (extra * _share(self.model, self.inputs)).to(loss.dtype)
            loss = loss + record.terms
        output["loss"] = loss

    def _terms(self, passes: list[tuple[Any, list[Selection]]]) -> Tensor | None:
        terms, rewards, greedy = [], None, None
        if any(s.log_prob is not None for s in passes[0][1]):
            rewards = torch.stack([_reward(self.model, self.inputs, found, found["loss"]) for found, _ in passes])
            if any(s.baseline is not None and s.baseline.needs_greedy for s in self.selectors.values()):
                greedy = self._greedy_reward()
        for index, (_, selections) in enumerate(passes):
            reward = others = None
            if rewards is not None:
                reward = rewards[index]
                others = torch.cat([rewards[:index], rewards[index + 1 :]]) if len(passes) > 1 else None
            terms.append(auxiliary_loss(selections, self.selectors, reward, greedy, others))
        found = [term for term in terms if term is not None]
        total = torch.stack(found).sum() / len(passes) if found else None
        for term in self._lessons(*passes[0]):
            total = term if total is None else total + term
        return total

    def _lessons(self, output: Any, selections: list[Selection]) -> Iterator[Tensor]:
        """What the soft teacher adds."""
        pupils = [s for s in selections if "teacher" in self.selectors[s.site].estimator.needs]
        data = getattr(self.model.config, "hard_attention", None) or {}
        weight = next(iter(self.selectors.values())).now(
            Schedule.parse(data.get("self_distillation", 0.0), "self_distillation")
        )
        if not pupils and not weight:
            return
        teacher = teach(self.model, self.forward, attention=bool(pupils))
        architecture = architecture_of(self.model)
        if architecture is None:
            return
        towers = architecture.towers(self.model)
        made = Recording(selections, reads={name: tower.source for name, tower in towers.items()})
        for selection in pupils:
            yield attention_loss(teacher, made, selection, self.selectors[selection.site])
        if weight:
            lesson = prediction_loss(teacher, output, architecture.labels(self.model, self.inputs))
            if lesson is not None:
                yield weight * lesson

    def _greedy_reward(self) -> Tensor:
        """Reward of the deterministic choices: the same forward in evaluation mode, without gradient."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                output = self.forward(Pass())
        finally:
            for module, training in modes:
                module.training = training
        return _reward(self.model, self.inputs, output, output["loss"])


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


def _target(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """States of the labels, ``[B, T, D]`` detached, all-zero rows where there is none; None without labels."""
    architecture = architecture_of(model)
    if architecture is None:
        return None
    labels, table = architecture.labels(model, inputs), architecture.target_table(model)
    if labels is None or table is None:
        return None
    return (table.detach()[labels.clamp(min=0)] * (labels != -100).unsqueeze(-1)).float()


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
