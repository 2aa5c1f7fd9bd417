"""Callback that connects the Trainer to the selectors: schedules, warm-up, logs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import HardAttentionError
from ..inspection.random_control import beside_random
from .driver import Driver
from .stock_trainer import prepare_trainer


class HardAttentionCallback(TrainerCallback, ExportableState):
    """Drive the selectors of a model that the stock ``Trainer`` trains.

    Schedules follow ``state.global_step``, also after a resume. At each logging step the callback adds
    ``hardattn/<site>/kept_ratio``, ``entropy``, ``temperature`` and ``budget`` to the Trainer's logs, and with a score-function
    estimator ``hardattn/reward`` and ``hardattn/baseline`` (means since the last logging step). The state of the baselines is saved in
    ``trainer_state.json``.

    Each evaluation compares the model with itself under random selections of equal size, on its first batch. It adds two numbers to the
    next row: ``hardattn/changed_by_random``, the share of answers that change (0: the model does not use what it selects), and
    ``hardattn/loss_over_random``, the increase of the loss. Both are omitted if weights are sharded or evaluated in another dtype, and,
    with a warning, if the loader cannot be read twice or its batches are not the model's keyword inputs.

    Trackers (W&B, TensorBoard, trackio ...) receive these numbers as well. ``resume_from_checkpoint`` and ``load_best_model_at_end``
    load every weight or raise an error; see ``stock_trainer``.

    Args:
        selector_warmup_steps: optimizer steps, >= 0, in which only the selectors learn. The Trainer clips gradients before
            a callback can drop those of the backbone, so it clips by the norm of the whole model.
        selector_learning_rate: learning rate of the selectors, > 0, in an optimizer that the Trainer creates; one of your own keeps its
            rates. None: the Trainer's rate,
            but at least 1e-3, because selectors are trained from scratch while the model is fine-tuned.

    Raises:
        HardAttentionError: the learning rate is not positive, or a warm-up is used under DeepSpeed, which keeps its own gradients.

    Examples:
        >>> Trainer(model, callbacks=[HardAttentionCallback(selector_warmup_steps=100)], ...).train()   # doctest: +SKIP
    """

    def __init__(self, selector_warmup_steps: int = 0, selector_learning_rate: float | None = None) -> None:
        if selector_learning_rate is not None and not selector_learning_rate > 0:
            raise HardAttentionError(
                f"selector_learning_rate={selector_learning_rate} is out of range in HardAttentionCallback; it must be > 0. Leave it out to "
                "use the Trainer's, but at least 1e-3."
            )
        prepare_trainer(HardAttentionCallback)
        self.selector_warmup_steps, self.selector_learning_rate = selector_warmup_steps, selector_learning_rate
        self.driver: Driver | None = None
        self.baselines: dict[str, Any] = {}
        self.control: dict[str, float] = {}
        self._told = False

    def add_to(self, trainer: Trainer) -> HardAttentionCallback:
        """Add this callback to ``trainer`` before its trackers; ``Trainer(callbacks=[...])`` does the same."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.selector_warmup_steps and args.deepspeed:
            raise HardAttentionError(
                f"selector_warmup_steps={self.selector_warmup_steps} does not work under DeepSpeed, which manages the "
                "gradients itself; the warm-up has to drop those of the backbone. Use 0, or train under DDP or FSDP."
            )
        if self.driver is not None:
            self.driver.close()
        self.driver = Driver(model, self.selector_warmup_steps, state.max_steps)
        if not self.driver.selectors:
            warnings.warn(
                f"HardAttentionCallback has no effect: {type(model).__name__} has no hard attention and trains soft. "
                "Load it with hard_attention=... or call hf_hardattn.apply().",
                stacklevel=2,
            )
        learned = [selector for selector in self.driver.selectors.values() if selector.learned]
        if learned and not any(p.requires_grad for selector in learned for p in selector.parameters()):
            warnings.warn(
                f"no selector of {type(model).__name__} is trained: none of their parameters requires a gradient, so they do not "
                "change. With PEFT, use modules_to_save=['selector', 'input_selector'].",
                stacklevel=2,
            )
        kept: Any = state.stateful_callbacks  # a dict by class name; the annotation in Transformers says list
        saved = kept.get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            self.driver.load_state_dict(saved["attributes"]["baselines"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.driver is not None:
            self.driver.begin_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.driver is not None:
            self.driver.before_update()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        other_weights = args.deepspeed or args.fsdp or args.fp16_full_eval or args.bf16_full_eval
        if self.driver is None or not self.driver.selectors or eval_dataloader is None or other_weights:
            return
        try:
            with torch.random.fork_rng():  # iterating a loader draws a seed; this must not affect the training
                batch = next(iter(eval_dataloader), None)
                found = {} if batch is None else beside_random(model, batch, seed=state.global_step)
        except Exception as error:  # noqa: BLE001 - a loader or Trainer of one's own may read batches in any way
            found = {}
            self._tell_of_no_comparison(error)
        self.control = {f"hardattn/{name}": value for name, value in found.items()}

    def _tell_of_no_comparison(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                "the evaluation is not compared with random selections, because its first batch could not be read again or is not made "
                f"of the model's keyword inputs ({type(error).__name__}: {' '.join(str(error).split())[:200]}).",
                stacklevel=3,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.driver is not None and logs is not None and "loss" in logs:  # a row of training, not of evaluation
            row = {**self.driver.logs(), **self.control}
            self.control = {}
            logs.update(row)
            if state.log_history:
                state.log_history[-1].update(row)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the callback's hooks from the model; called when a training ends, even with an error."""
        if self.driver is not None:
            self.driver.close()

    def state(self) -> dict[str, Any]:
        """Return the state that is saved in ``trainer_state.json``."""
        baselines = self.baselines if self.driver is None else self.driver.state_dict()
        args = {
            "selector_warmup_steps": self.selector_warmup_steps,
            "selector_learning_rate": self.selector_learning_rate,
        }
        return {"args": args, "attributes": {"baselines": baselines}}
