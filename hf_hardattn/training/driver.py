"""Connect a training loop to the selectors: schedules by step, warm-up and logging."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..api import set_step
from ..baselines import Baseline
from ..errors import HardAttentionError
from ..estimators import Estimator
from ..modeling.context import CONTEXT
from ..modeling.lost_terms import terms_of, warn_of_lost_terms
from ..modeling.selection import Selection
from ..modeling.selector import Selector
from ..recording import selectors


class Driver:
    """Drive the selectors of a model through training; ``HardAttentionCallback`` does it for the Trainer.

    It sets the optimizer step of the schedules, lets only the selectors learn during the warm-up, and collects their statistics.
    Nothing is copied from the device before ``logs`` is called.

    Args:
        model: with or without hard attention, not wrapped by DDP.
        selector_warmup_steps: optimizer steps, >= 0, in which only the selectors learn. All other gradients are dropped before the
            optimizer step; ``requires_grad`` is unchanged, because DDP and a resumed run depend on it.
        steps: optimizer steps of the whole training, for schedules that give their length as a share of it.

    Raises:
        HardAttentionError: a warm-up is requested, but no selector has trainable parameters.

    Examples:
        >>> driver = Driver(model, selector_warmup_steps=100)           # doctest: +SKIP
        >>> for step, batch in enumerate(loader):                       # doctest: +SKIP
        ...     driver.begin_step(step)
        ...     model(**batch).loss.backward()
        ...     driver.before_update()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    ``accelerator.register_for_checkpointing(driver)`` adds the state of baselines and estimators to ``accelerator.save_state``.
    """

    def __init__(self, model: nn.Module, selector_warmup_steps: int = 0, steps: int | None = None) -> None:
        self.model, self.selectors, self.step, self.steps = model, selectors(model), 0, steps
        self.warmup = selector_warmup_steps
        if self.warmup < 0:
            raise HardAttentionError(
                f"selector_warmup_steps={self.warmup} is out of range; it must be a number of steps, >= 0."
            )
        learning = (p for s in self.selectors.values() for p in s.parameters() if p.requires_grad)
        if self.warmup and next(learning, None) is None:
            raise HardAttentionError(
                f"selector_warmup_steps={self.warmup} leaves nothing to train; no selector of {type(model).__name__} has "
                "trainable parameters. Use 0, or a scorer with parameters ('linear', 'mlp', 'query_key')."
            )
        self._latest: dict[str, Selection] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._share: Tensor | None = None
        self._handles = [s.register_forward_hook(self._note_selection) for s in self.selectors.values()]
        self.baselines = [s.baseline for s in self.selectors.values() if s.baseline is not None]
        self._handles += [baseline.register_forward_hook(self._note_reward) for baseline in self.baselines]
        peft: Any = model
        inner = peft.get_base_model() if hasattr(model, "get_base_model") else model
        self._handles.append(inner.register_forward_hook(self._weigh, with_kwargs=True))
        data = getattr(getattr(inner, "config", None), "hard_attention", None) or {}
        self._terms = terms_of(self.selectors.values(), data.get("self_distillation"))
        # of the current step: whether a forward pass returned a training loss, and whether a backward pass came from one
        self._returned_loss = self._read_loss = False
        self._handles.append(inner.register_forward_hook(self._note_loss))

    def begin_step(self, step: int, share: Tensor | None = None) -> None:
        """Start a micro-batch of the optimizer step ``step``, counted from 0 over the whole run, including resumed parts.

        Args:
            share: fp32 ``[]`` or None (1); weight of this micro-batch's task loss in the mean over all micro-batches and ranks.
                The estimators' own terms are means over examples and are not weighted.
        """
        self.step, self._share = step, share
        set_step(self.model, step, self.steps)
        # only during a step: a training that is interrupted between steps does not leave the baselines deferred
        self._defer(True)

    def before_update(self) -> None:
        """Call this when the gradients are complete, before they are clipped and before the optimizer step."""
        for baseline in self.baselines:
            baseline.update()
        self._defer(False)
        if self._returned_loss and not self._read_loss:
            warn_of_lost_terms(
                f"nothing of the loss that {type(self.model).__name__} returned reached this optimizer step",
                self._terms,
                "Use outputs.loss in compute_loss; a loss of your own can be computed inside the model's forward.",
            )
            self._terms = ()  # told once
        self._returned_loss = self._read_loss = False
        if self.step < self.warmup:
            drop_backbone_gradients(self.model)

    def logs(self) -> dict[str, float]:
        """Read the scalars of the last training forward pass, and the mean reward and baseline since the last call."""
        row: dict[str, float] = {}
        for site, selector in self.selectors.items():
            latest = self._latest.get(site)
            if latest is not None:
                row[f"hardattn/{site}/kept_ratio"] = latest.kept_ratio.float().mean().item()
                if latest.entropy is not None:
                    row[f"hardattn/{site}/entropy"] = latest.entropy.float().mean().item()
            row[f"hardattn/{site}/temperature"] = float(selector.now(selector.temperature))
            budget = selector.budget(drawing=True)
            row[f"hardattn/{site}/budget"] = float(max(budget.value, budget.least))
        for name, total in self._sums.items():
            row[f"hardattn/{name}"] = (total / self._count).item()
        self._sums, self._count = {}, 0
        return row

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._latest = [], {}
        self._defer(False)

    def _defer(self, deferred: bool) -> None:
        for baseline in self.baselines:
            baseline.deferred = deferred

    def state_dict(self) -> dict[str, Any]:
        """State of baselines and estimators as numbers and lists; it describes the run and is not saved in model files."""
        found: dict[str, Any] = {}
        for site, part in self._parts():
            for name in part.run_state:
                value = getattr(part, name)
                found.setdefault(site, {})[name] = None if value is None else value.tolist()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of ``state_dict``; sites that do not exist are skipped, and so are numbers that are not finite."""
        for site, part in self._parts():
            for name in set(part.run_state) & state.get(site, {}).keys():
                value = None if state[site][name] is None else torch.tensor(state[site][name])
                if value is None or value.isfinite().all():
                    setattr(part, name, value)
                else:
                    warnings.warn(
                        f"the checkpoint's {name} of {type(part).__name__} at {site!r} is not finite ({state[site][name]}), "
                        "so it was not loaded; it starts from its initial value.",
                        stacklevel=2,
                    )

    def _parts(self) -> Iterator[tuple[str, Baseline | Estimator]]:
        """Yield the parts of the selectors that hold state of the run: baselines and estimators."""
        for site, selector in self.selectors.items():
            yield from ((site, part) for part in (selector.baseline, selector.estimator) if part is not None)

    def _weigh(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._share is None or not model.training or output.get("loss") is None:
            return
        terms = kwargs[CONTEXT].terms if CONTEXT in kwargs else None
        task = output["loss"] if terms is None else output["loss"] - terms
        output["loss"] = task * self._share if terms is None else task * self._share + terms

    def _note_loss(self, model: nn.Module, args: Any, output: Any) -> None:
        """Note whether the loss of a training forward pass, which holds the selectors' terms, is read by a backward pass."""
        if not self._terms or torch.compiler.is_compiling() or not isinstance(output, Mapping):
            return
        loss = output.get("loss")
        if model.training and loss is not None and loss.requires_grad:
            self._returned_loss = True
            loss.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        self._read_loss = True

    def _note_selection(self, selector: Selector, args: Any, selection: Selection) -> None:
        if _is_a_choice(selector):
            entropy = None if selection.entropy is None else selection.entropy.detach()
            # do not keep a graph alive between steps
            self._latest[selector.site] = selection.replace(
                scores=selection.mask,
                gates=None,
                log_prob=None,
                penalty=None,
                entropy=entropy,
            )

    def _note_reward(self, baseline: nn.Module, args: tuple[Any, ...], value: Tensor) -> None:
        if _is_a_choice(baseline):
            for name, tensor in (("reward", args[0]), ("baseline", value)):
                mean = tensor.detach().float().mean()
                self._sums[name] = self._sums[name] + mean if name in self._sums else mean
            self._count += 1


def _is_a_choice(module: nn.Module) -> bool:
    """Whether to count a forward pass: only in training, not when it is recomputed inside backward or traced."""
    return module.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1


def drop_backbone_gradients(model: nn.Module) -> None:
    """Drop all gradients except those of the selectors, so that an optimizer leaves the other parameters and their state unchanged."""
    kept = {id(p) for module in model.modules() if isinstance(module, Selector) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.grad = None
