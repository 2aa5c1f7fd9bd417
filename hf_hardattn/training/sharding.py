"""Settings of FSDP and DeepSpeed for a hard model, and errors for what they do not support."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..errors import HardAttentionError
from ..models import family_of


def without_peft(model: Any) -> Any:
    """Return the model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def name_fsdp_units(accelerator: Accelerator, model: nn.Module) -> None:
    """Make the layers of the model's towers FSDP units, by their present class names.

    Accelerate's default, all of ``_no_split_modules``, fails on any ViT: it shards the patch embedding as part of the embeddings,
    and then again by itself.
    """
    plugin, model = getattr(accelerator.state, "fsdp_plugin", None), without_peft(model)
    family = family_of(model)
    if plugin is None or family is None:
        return
    layers = {type(layer) for tower in family.towers(model).values() for layer in tower.layers}
    wanted = plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = (
        sorted(cls.__name__ for cls in layers if not wanted or {base.__name__ for base in cls.__mro__} & set(wanted))
        or wanted
    )


def check_warmup(distributed_type: DistributedType, steps: int) -> None:
    """Raise if gradients cannot be dropped during a warm-up.

    Raises:
        HardAttentionError: ``steps`` > 0 under DeepSpeed.
    """
    if steps and distributed_type == DistributedType.DEEPSPEED:
        raise HardAttentionError(
            f"selector_warmup_steps={steps} has no effect under DeepSpeed; its engine makes the optimizer step inside the backward pass, before the "
            "gradients of the other parameters can be dropped. First train a run with --train_selectors_only, or use DDP or FSDP2."
        )
