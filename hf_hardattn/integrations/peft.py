"""Saving adapters: PEFT writes which modules it adapts, but not the model's sites, so the hard ``config.json`` is saved as well.

``peft_model.push_to_hub`` and the Trainer save through the same method, so the adapters they write also load as hard models: with
``hf_hardattn.load``, ``PeftModel.from_pretrained`` or an Auto class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..modeling.model_config import refuse_edited_config
from .wrapping import wrap_method


def register() -> None:
    """Wrap ``save_pretrained`` of PEFT and of Transformers once."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    wrap_method(PeftModel, "save_pretrained", _save_pretrained)
    wrap_method(PreTrainedModel, "save_pretrained", _save_pretrained_of_transformers)


def _save_pretrained(save: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    refuse_edited_config(self.get_base_model())
    save(self, *args, **kwargs)
    given = inspect.signature(save).bind(self, *args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    inner = self.get_base_model()
    if asked["is_main_process"] and _is_hard(inner):
        for name in asked["selected_adapters"] or self.peft_config:
            folder = Path(asked["save_directory"])
            save_config(inner, folder if name == "default" else folder / name)


def _save_pretrained_of_transformers(save: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    refuse_edited_config(self)
    result = save(self, *args, **kwargs)
    # For a model with adapters, Transformers writes only the adapter.
    if getattr(self, "_hf_peft_config_loaded", False) and _is_hard(self):
        given = inspect.signature(save).bind(self, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["is_main_process"]:
            save_config(self, Path(given.arguments["save_directory"]))
    return result


def _is_hard(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "hard_attention", None) is not None


def save_config(model: Any, folder: Path) -> None:
    """Write a model's ``config.json``, including the class to load it with."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
