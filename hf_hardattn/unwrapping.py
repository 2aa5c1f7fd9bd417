"""Find the model inside its wrappers: one place for PEFT, DDP, FSDP, ``torch.compile``, Accelerate and pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import HardAttentionError


def unwrap(model: Any) -> nn.Module:
    """Return the Transformers model inside ``model``, however it is wrapped, or ``model`` itself if it is not wrapped.

    Accelerate's offloading and FSDP2 do not wrap a module. DDP, DataParallel and FSDP1 store it as ``module``, ``torch.compile`` as
    ``_orig_mod``, and a pipeline or a Trainer as ``model``. PEFT returns it from ``get_base_model()``.

    Raises:
        HardAttentionError: if there is no module.
    """
    inner: Any = model
    if not isinstance(inner, nn.Module):
        inner = getattr(inner, "model", None)
    if not isinstance(inner, nn.Module):
        raise HardAttentionError(
            f"{type(model).__name__} is not a model; hard attention needs a torch.nn.Module, wrapped or not. Load it first, "
            "with from_pretrained(...)."
        )
    while True:
        base = getattr(inner, "get_base_model", None)
        if callable(base):
            inner = base()
        elif type(inner).__name__ == "PeftMixedModel":
            mixed: Any = inner
            inner = mixed.base_model.model
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module) and not isinstance(inner, PreTrainedModel):
            inner = inner.module
        else:
            return inner


def refuse_without_config(model: nn.Module) -> None:
    """Refuse a plain module around a model, which has no configuration to hold the settings of hard attention.

    Raises:
        HardAttentionError: if the module has no ``config``.
    """
    if not hasattr(model, "config"):
        inside = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
        place = f"the model inside it (.{inside[0]})" if inside else "a model of Transformers"
        raise HardAttentionError(
            f"{type(model).__name__} has no config, which holds the settings of hard attention and is saved with them. Call it on {place}, "
            f"or derive {type(model).__name__} from PreTrainedModel."
        )


def refuse_other_than_batch(batch: Any, verb: str) -> None:
    """Refuse anything but a batch of keyword inputs.

    Raises:
        HardAttentionError: if it is not a mapping.
    """
    if not isinstance(batch, Mapping):
        raise HardAttentionError(
            f"{verb} got {type(batch).__name__}; a batch is a dict of the model's keyword inputs, such as {{'pixel_values': images}}. Pass "
            "such a dict."
        )


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Refuse a sharded model, for operations that need every weight in one piece.

    Raises:
        HardAttentionError: if FSDP2 has sharded the weights.
    """
    name = next((name for name, weight in model.named_parameters() if hasattr(weight, "full_tensor")), None)
    if name is not None:
        raise HardAttentionError(
            f"'{name}' of {type(model).__name__} is sharded by FSDP2; {verb} needs unsharded weights. Call it before fully_shard(), or "
            "on a model loaded from a complete checkpoint."
        )


def refuse_offloaded(model: nn.Module, verb: str) -> None:
    """Refuse an offloaded model, for operations that read its weights directly.

    Raises:
        HardAttentionError: if Accelerate has offloaded the weights.
    """
    name = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if name is not None:
        raise HardAttentionError(
            f"'{name}' of {type(model).__name__} is offloaded, and so not in memory between calls; {verb} needs it there. Call it on a "
            "fully loaded model, before cpu_offload() or disk_offload()."
        )
