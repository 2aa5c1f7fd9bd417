"""PEFT writes where it adapts a model, but not where the model looks: its ``save_pretrained`` leaves the hard ``config.json`` too.

``peft_model.push_to_hub`` and the Trainer save through the same method, so what they write reloads hard with ``hf_hardattn.load``.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

_MARK = "_saves_hard_attention"


def register() -> None:
    """Wrap ``PeftModel.save_pretrained`` once. Called when a model becomes hard, so that nobody else pays for importing PEFT."""
    from peft import PeftModel

    save_pretrained: Any = PeftModel.save_pretrained
    if hasattr(save_pretrained, _MARK):
        return
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def hard_save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        save_pretrained(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        inner = self.get_base_model()
        config = getattr(inner, "config", None)
        if asked["is_main_process"] and getattr(config, "hard_attention", None) is not None:
            for name in asked["selected_adapters"] or self.peft_config:
                folder = Path(asked["save_directory"])
                save_config(inner, folder if name == "default" else folder / name)

    setattr(hard_save_pretrained, _MARK, True)
    PeftModel.save_pretrained = hard_save_pretrained  # type: ignore[method-assign]


def save_config(model: Any, folder: Path) -> None:
    """Write a model's ``config.json`` with the class that it is to be loaded as."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
