"""The training loss of a hard model: the estimators' terms are added to ``outputs.loss`` at the end of a call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..modeling.arguments import parameter_names, takes_keywords
from ..modeling.context import CONTEXT, ForwardContext
from ..modeling.lost_terms import terms_of, warn_of_lost_terms
from ..modeling.selection import Selection
from ..modeling.selector import Selector
from ..models import family_of
from ..modes import evaluating
from ..recording import Recording, selectors
from ..schedules import Schedule
from ..unwrapping import refuse_offloaded
from .distillation import attention_loss, prediction_loss, teach
from .marginal import marginal_loss
from .score_function import auxiliary_loss
from .task_loss import explained, reward_of, share_of_batch

_TOLD = "hard_attention_told"  # attribute of a model: the warnings about its selectors that were issued


def prepare_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: ForwardContext) -> None:
    """Before a training call, give the labels, or the states of the labels, to the estimators that need them."""
    found = context.selectors = selectors(model)
    learning = {site: selector for site, selector in found.items() if selector.training}
    if not torch.compiler.is_compiling():
        _tell_of_annealing(model, learning)
        if model.training and torch.is_grad_enabled():
            _tell_of_evaluation(model, found)
    with_heads = [site for site, selector in learning.items() if selector.head is not None]
    if with_heads:
        context.classes = _classes(model, _named(model, args, kwargs), with_heads[0])
    if not any(selector.posterior is not None for selector in learning.values()):
        return
    context.target = _target(model, _named(model, args, kwargs))
    if context.target is None:
        warnings.warn(
            f"{type(model).__name__} got no labels that an inference network could read, so estimator 'variational' draws from its "
            "prior and learns like 'simple'. Pass labels, or use estimator 'simple'.",
            stacklevel=2,
        )


def _tell_of_annealing(model: nn.Module, found: Mapping[str, Selector]) -> None:
    """Warn once that the budgets are not annealed, because the length of the training is not known."""
    _tell_once(
        model,
        "the budget of {} is not annealed, because the number of training steps is not known; pathwise estimators learn better if the budget "
        "starts at 1.0 and then falls. Add HardAttentionCallback() to the Trainer, call hf_hardattn.set_step(model, step, total_steps) before "
        "each step, or set anneal=0 to silence this.",
        [site for site, selector in found.items() if selector.lacks_length and selector.learned],
    )


def _tell_of_evaluation(model: nn.Module, found: Mapping[str, Selector]) -> None:
    """Warn once that selectors learn nothing, because a part of the model that contains them is in evaluation mode."""
    resting = [site for site, selector in found.items() if not selector.training]
    _tell_once(
        model,
        "the model is in training mode, but the selectors of {} are in evaluation mode and learn nothing. After a call such as "
        "model.vit.eval(), call .train() of each of hf_hardattn.selectors(model).values(), or .requires_grad_(False) to silence this.",
        [site for site in resting if any(parameter.requires_grad for parameter in found[site].parameters())],
    )


def _tell_once(model: nn.Module, message: str, sites: list[str]) -> None:
    """Issue a warning about some sites of a model, unless there are none or it was issued before."""
    told: set[str] = model.__dict__.setdefault(_TOLD, set())
    if not sites or message in told:
        return
    told.add(message)
    warnings.warn(
        message.format(", ".join(map(repr, sites[:3])) + (" ..." if len(sites) > 3 else "")),
        stacklevel=3,
    )


def add_terms(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, context: ForwardContext
) -> None:
    """After a training call, put the whole training loss into ``output``."""
    Step(model, args, kwargs, context).close(output)


class Step:
    """One training forward pass of a hard model, with the additional passes that its estimators need."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: ForwardContext | None = None
    ):
        self.model, self.args = model, args
        self.context = ForwardContext(model) if context is None else context
        self.kwargs = {name: value for name, value in kwargs.items() if name != CONTEXT}
        self.hands_down = CONTEXT in kwargs or context is None
        self.selectors = self.context.selectors or selectors(model)
        self.inputs = _named(model, args, self.kwargs)

    def forward(self, context: ForwardContext | None = None, **changes: Any) -> Any:
        """Call the model's own forward once more, without its hooks."""
        context = self.another() if context is None else context
        if self.hands_down:
            changes[CONTEXT] = context
        elif not takes_keywords(self.model):
            names = parameter_names(self.model)
            changes = {name: value for name, value in changes.items() if name in names}
        context.enter(self.model)
        try:
            return self.model.forward(*self.args, **{**self.kwargs, **changes})
        finally:
            context.leave(self.model)

    def another(self) -> ForwardContext:
        """Return a context for one more forward pass on the same inputs."""
        context, known = ForwardContext(self.model), self.context
        context.target, context.source_given = known.target, known.source_given
        context.classes = known.classes
        context.labels, context.ids, context.predictions = known.labels, known.ids, known.predictions
        context.kept_source = known.kept_source
        return context

    def close(self, output: Any) -> None:
        """Put the whole training loss into ``output``."""
        record = self.context
        if not isinstance(output, MutableMapping) or output.get("loss") is None:
            if not torch.compiler.is_compiling():
                self._warn_of_lost_terms(record.selections)
            return
        exact = [s for s in record.selections if "choices" in self.selectors[s.site].estimator.needs]
        task = output["loss"]
        if exact:
            output["loss"] = self._marginal(exact, output)
        passes = [(output, record.selections)]
        for _ in range(max(s.estimator.samples for s in self.selectors.values()) - 1):
            other = self.another()
            passes.append((self.forward(other), other.selections))
        extra = self._terms(passes)
        losses = [found["loss"] for found, _ in passes]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        if extra is not None:
            record.terms = (extra * share_of_batch(self.model, self.inputs, output, task)).to(loss.dtype)
            loss = loss + record.terms
        output["loss"] = loss

    def _marginal(self, exact: list[Selection], output: Any) -> Tensor:
        """Return the loss that replaces the model's own where every choice of a site is tried."""
        site = exact[0].site
        if len(exact) > 1:
            raise HardAttentionError(
                f"estimator 'marginal' at {site!r} and {exact[1].site!r}; it tries every selection of ONE site. "
                "Use one site, or use estimator 'simple' at the others."
            )
        if not explained(self.model, self.inputs, output, output["loss"]):
            raise HardAttentionError(
                f"the loss of {type(self.model).__name__} is not the mean loss of its labels, which estimator 'marginal' at {site!r} "
                "weighs. Use estimator 'simple'."
            )
        loss = marginal_loss(self.model, self.selectors[site], exact[0], self.inputs, self.forward)
        return loss * share_of_batch(self.model, self.inputs, output, output["loss"])

    def _warn_of_lost_terms(self, selections: list[Selection]) -> None:
        """Warn about terms of the training loss that have no effect, because the model returns no loss."""
        lost = terms_of((self.selectors[selection.site] for selection in selections), self._distillation_weight())
        if lost:
            warn_of_lost_terms(
                f"{type(self.model).__name__} returned no loss",
                lost,
                "Pass labels; with label_smoothing_factor or compute_loss_func, the Trainer does not pass them to the model.",
            )

    def _distillation_weight(self) -> float:
        data = getattr(self.model.config, "hard_attention", None) or {}
        schedule = Schedule.parse(data.get("self_distillation", 0.0), "self_distillation")
        return next(iter(self.selectors.values())).now(schedule)

    def _terms(self, passes: list[tuple[Any, list[Selection]]]) -> Tensor | None:
        terms, rewards, greedy = [], None, None
        if any(s.log_prob is not None for s in passes[0][1]):
            rewards = torch.stack([reward_of(self.model, self.inputs, found, found["loss"]) for found, _ in passes])
            if any(s.baseline is not None and s.baseline.needs_greedy for s in self.selectors.values()):
                greedy = self._greedy_reward()
        for index, (_, selections) in enumerate(passes):
            reward = others = None
            if rewards is not None:
                reward = rewards[index]
                others = torch.cat([rewards[:index], rewards[index + 1 :]]) if len(passes) > 1 else None
                selections = [self._by_example(selection, reward) for selection in selections]
            terms.append(auxiliary_loss(selections, self.selectors, reward, greedy, others))
        found = [term for term in terms if term is not None]
        total = torch.stack(found).sum() / len(passes) if found else None
        for term in self._distillation(*passes[0]):
            total = term if total is None else total + term
        return total

    def _distillation(self, output: Any, selections: list[Selection]) -> Iterator[Tensor]:
        """Yield the terms of the soft teacher."""
        distilled = [s for s in selections if "teacher" in self.selectors[s.site].estimator.needs]
        weight = self._distillation_weight()
        if not distilled and not weight:
            return
        teacher = teach(self.model, self.forward, attention=bool(distilled))
        family = family_of(self.model)
        if family is None:
            return
        towers = family.towers(self.model)
        made = Recording(selections, reads={name: tower.source for name, tower in towers.items()})
        for selection in distilled:
            yield attention_loss(teacher, made, selection, self.selectors[selection.site])
        if weight:
            yield weight * prediction_loss(teacher, output, family.labels(self.model, self.inputs))

    def _greedy_reward(self) -> Tensor:
        """Return the reward of the deterministic choices: the same forward in evaluation mode, without gradient."""
        with evaluating(self.model), torch.no_grad():
            output = self.forward()
        return reward_of(self.model, self.inputs, output, output["loss"])

    def _by_example(self, selection: Selection, reward: Tensor) -> Selection:
        """Return a selection with one log-probability per reward, where an input holds several rows of each example, ``[B, C, ...]``.

        The rows of a multiple choice, for example, are chosen one by one, and share the reward of their question.
        """
        log_prob, summary = selection.log_prob, selection.summary
        if log_prob is None or reward.dim() == 0 or len(log_prob) == len(reward):
            return selection
        groups = (len(reward), len(log_prob) // max(len(reward), 1))
        if not any(isinstance(x, Tensor) and x.dim() > 2 and x.shape[:2] == groups for x in self.inputs.values()):
            return selection  # ``auxiliary_loss`` raises the error
        return selection.replace(
            log_prob=log_prob.sum((1, 2)).view(groups).sum(1)[:, None, None],
            summary=None if summary is None else summary.view(*groups, -1).mean(1),
        )


def _target(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Return the states of the labels, ``[B, T, D]``, detached, with zeros where there is no label; None without labels."""
    family = family_of(model)
    if family is None:
        return None
    labels, table = family.labels(model, inputs), family.target_table(model)
    if labels is None or table is None:
        return None
    if table.is_meta and not labels.is_meta:
        refuse_offloaded(model, "estimator 'variational' reads the classifier's weights in training, and")
    return (table.detach()[labels.clamp(min=0)] * (labels != -100).unsqueeze(-1)).float()


def _classes(model: nn.Module, inputs: dict[str, Any], site: str) -> Tensor:
    """Return the class of each example, int64 ``[B]``.

    Raises:
        HardAttentionError: the call has no class for each example: no labels, several labels in a row, or regression targets.
    """
    family = family_of(model)
    labels = None if family is None else family.labels(model, inputs)
    if labels is None or labels.shape[1] != 1:
        given = inputs.get("labels")
        what = "no labels" if given is None else f"labels of shape {tuple(given.shape)} and {given.dtype}"
        raise HardAttentionError(
            f"{type(model).__name__} was given {what} in training; estimator 'cropr' at '{site}' learns from the class of each example, one "
            "integer label per row. Pass such labels, or use estimator 'simple' (any task) or 'rloo' (also trains gathered)."
        )
    return labels[:, 0]


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs by name."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


# A hard model holds these as data. They are module-level functions, so that the model can be copied and pickled.
TERMS = (add_terms, prepare_call)
