"""Find the model inside its wrappers: one place for PEFT, DDP, FSDP, ``torch.compile`` and Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformers model inside ``model``, however it is wrapped; ``model`` itself where there is no wrapper.

    Accelerate's offloading and FSDP2 leave a module what it is; DDP, DataParallel and FSDP1 hold it as ``module``,
    ``torch.compile`` as ``_orig_mod``, PEFT behind ``get_base_model()``.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif type(inner).__name__ == "PeftMixedModel":
            inner = inner.base_model.model
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module) and not isinstance(inner, PreTrainedModel):
            inner = inner.module
        else:
            return inner
