"""Extend the stock ``Trainer`` for models with hard attention when a ``HardAttentionCallback`` is created.

The extension has four parts: selectors have their own learning rate; the callback's numbers reach the trackers; a checkpoint that is
loaded, to resume or as the best one, restores every weight; and the callback's hooks are removed even if the training ends with an error.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.core_model_loading import revert_weight_conversion

from ..errors import HardAttentionError
from .selector_rate import selector_rate, set_selector_rate

_MARK = "_knows_hard_attention"
_LOADERS = ("_load_from_checkpoint", "_load_best_model")


def prepare_trainer(ours: type) -> None:
    """Wrap the methods of ``Trainer`` once; trainers without a callback of the class ``ours`` are not affected."""
    if hasattr(Trainer, _MARK):
        return
    setattr(Trainer, _MARK, True)
    trainer: Any = Trainer
    trainer.train = _with_callbacks(trainer.train, ours)
    trainer.create_optimizer = _with_selector_rate(trainer.create_optimizer, ours)
    for name in _LOADERS:
        setattr(trainer, name, _with_every_weight(getattr(trainer, name), ours))


def _ours(trainer: Any, ours: type) -> list[Any]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ours)]


def _with_callbacks(train: Callable[..., Any], ours: type) -> Callable[..., Any]:
    @functools.wraps(train)
    def hard_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        callbacks = self.callback_handler.callbacks
        callbacks.sort(key=lambda callback: not isinstance(callback, ours))  # before the trackers, which read the logs
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in _ours(self, ours):
                callback.close()

    return hard_train


def _with_selector_rate(create: Callable[..., Any], ours: type) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_with_rate(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.optimizer is not None  # the user's own optimizer: keep its groups
        optimizer = create(self, *args, **kwargs)
        asked = [callback.selector_learning_rate for callback in _ours(self, ours)]
        if given and any(rate is not None for rate in asked):
            warnings.warn(
                f"selector_learning_rate={asked[0]} of HardAttentionCallback has no effect: the Trainer was given an optimizer, which keeps "
                "its own learning rates. Give the selectors a group of their own there, or leave optimizers out.",
                stacklevel=2,
            )
        for callback in [] if given else _ours(self, ours):
            rate = selector_rate(self.args.learning_rate, callback.selector_learning_rate)
            if rate != self.args.learning_rate and isinstance(optimizer, torch.optim.Optimizer):
                set_selector_rate(optimizer, self.model, rate)
        return optimizer

    return create_with_rate


def _with_every_weight(load: Callable[..., Any], ours: type) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_every_weight(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            not _ours(self, ours)
            or not isinstance(self.model, PreTrainedModel)
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
        ):
            return load(self, *args, **kwargs)
        with every_weight(self.model):
            return load(self, *args, **kwargs)

    return load_every_weight


@contextmanager
def every_weight(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model.load_state_dict`` read the names that ``save_pretrained`` writes, and check that no weight is missing.

    Transformers 5.23 saves some models under the names of earlier versions. ``from_pretrained`` maps them back, but the Trainer
    does not: it loads no layer of a ViT.

    Raises:
        HardAttentionError: the checkpoint does not contain all weights.
    """
    names, seen = saved_names(model), set[str]()

    def rename(module: nn.Module, state_dict: dict[str, Tensor], *args: Any) -> None:
        for saved in names.keys() & state_dict.keys():
            state_dict.setdefault(names[saved], state_dict.pop(saved))
        seen.update(state_dict)

    handle = model.register_load_state_dict_pre_hook(rename)
    try:
        yield
    finally:
        handle.remove()
    if seen:  # a sharded checkpoint loads one shard after the other
        _check_loaded(model, seen)


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Map the names under which ``save_pretrained`` writes tensors to the model's own names, where the two differ."""
    own = model.state_dict()
    by_tensor = {id(tensor): name for name, tensor in own.items()}
    saved = revert_weight_conversion(model, own)
    return {name: by_tensor[id(t)] for name, t in saved.items() if id(t) in by_tensor and name not in own}


def _check_loaded(model: PreTrainedModel, seen: set[str]) -> None:
    own = model.state_dict(keep_vars=True)
    loaded = {id(tensor) for name, tensor in own.items() if name in seen}  # tied tensors are saved once
    # a head of ``cropr``: a resumed training starts with a new one
    unsaved = model._keys_to_ignore_on_save or ()
    missing = sorted(name for name, tensor in own.items() if id(tensor) not in loaded and name not in unsaved)
    if missing:
        raise HardAttentionError(
            f"the checkpoint has {len(own) - len(missing)} of {len(own)} tensors of {type(model).__name__} (first missing: "
            f"{missing[0]!r}); the others would keep their current values. Load the model with from_pretrained(checkpoint) instead."
        )
