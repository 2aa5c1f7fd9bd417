"""How Transformers learns about hard attention: four methods are wrapped, inert until a config carries ``hard_attention``.

``post_init``, which every model calls at the end of every way to construct it, then adds that one model's hooks and selectors. Transformers' own ``register_patch_mapping`` is not used: its ``patch_output_recorders`` rewrites class-level
recorders, so that models of the stock classes, even those built before, return no attentions any more; and it misses
``ViTModel(config)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..api import attach_to, remove
from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from ..fields import is_configuration
from ..modeling.selector import Selector
from ..models import family_of
from ..recording import selectors
from .wrapping import wrap_method

_ADVICE = "Pass hard_attention=... to use them, or hard_attention=None to silence this."


def _check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], asked: bool
) -> None:
    """Raise when a checkpoint says that it is hard and lacks its selectors; warn when it has selectors and runs soft."""
    if asked:
        return
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Selector))
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(prefixes)) if prefixes else []
    # where no weight at all was found, the file is not of this model, and Transformers' own report says so
    if lacking and len(info["missing_keys"]) < len(model.state_dict()):
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        saved = _saved_hard_attention(place, kwargs)
        if saved and HardAttentionConfig.parse(saved).to_dict() == model.config.hard_attention:
            raise HardAttentionError(
                f"{place} says hard_attention in its config, but its weights lack {len(lacking)} selector tensors (first: '{lacking[0]}'); "
                "a hard checkpoint must hold its selectors. Load a complete checkpoint, or pass hard_attention=HardAttentionConfig(...) "
                "to train fresh ones, or hard_attention=None to load it soft."
            )
    spare = [key for key in info["unexpected_keys"] if "selector.scorer." in key]
    if spare and not prefixes:
        warnings.warn(
            f"the checkpoint holds {len(spare)} selector tensors (first: '{spare[0]}') but its config has no hard_attention: "
            f"the model runs SOFT. {_ADVICE}",
            stacklevel=4,
        )


def _saved_hard_attention(place: Any, kwargs: Mapping[str, Any]) -> Any:
    """What the checkpoint's own config.json says; None where there is none, as with a state dict that was passed."""
    if place is None:
        return None
    hub = {k: kwargs[k] for k in ("revision", "subfolder", "token", "cache_dir", "local_files_only") if k in kwargs}
    try:
        saved, _ = PreTrainedConfig.get_config_dict(place, **hub)
    except OSError:
        return None
    return saved.get("hard_attention")


def _asks(config: Any) -> bool:
    """Whether the caller's ``config`` says whether to be hard: the Auto classes put the keyword there.

    A dict is what a checkpoint said, not the caller; a model that no configuration made hard has no such attribute of its own.
    """
    given = getattr(config, "__dict__", {})
    return "hard_attention" in given and not isinstance(given["hard_attention"], Mapping)


def _post_init(post_init: Callable[..., Any], self: PreTrainedModel) -> None:
    wanted = getattr(self.config, "hard_attention", None)
    # a class that no family knows may hold a model that one does, or be a part of one: those decide
    known = wanted is not None and family_of(self) is not None
    if known:
        attach_to(self, HardAttentionConfig.parse(wanted))
    elif wanted is None and selectors(self):
        remove(self)  # the outer config decides: hard parts of a model that was asked to be soft
    post_init(self)


def _initialize_weights(
    initialize_weights: Callable[..., Any], self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False
) -> None:
    if not isinstance(module, Selector):
        initialize_weights(self, module, is_custom_code)
    elif not getattr(module, "_is_hf_initialized", False):  # a custom class (the GRU, the retrievers) would skip it
        module.reset_parameters()
        module._is_hf_initialized = True


def _from_pretrained(
    from_pretrained: Callable[..., Any],
    cls: type[PreTrainedModel],
    *args: Any,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    asked = "hard_attention" in kwargs or _asks(kwargs.get("config"))
    model, info = from_pretrained(cls, *args, output_loading_info=True, **kwargs)
    _check_loaded(model, info, args, kwargs, asked)
    return (model, info) if output_loading_info else model


def _to_dict(to_dict: Callable[..., Any], self: PreTrainedConfig) -> dict[str, Any]:
    data: dict[str, Any] = to_dict(self)
    if is_configuration(data.get("hard_attention")):
        data["hard_attention"] = data["hard_attention"].to_dict()
    return data


def register() -> None:
    """Wrap Transformers once; called by ``import hf_hardattn``."""
    PreTrainedConfig.hard_attention = None  # from_pretrained takes keywords its config has an attribute for
    wrap_method(PreTrainedModel, "post_init", _post_init)
    wrap_method(PreTrainedModel, "_initialize_weights", _initialize_weights)
    wrap_method(PreTrainedModel, "from_pretrained", _from_pretrained)
    wrap_method(PreTrainedConfig, "to_dict", _to_dict)
