"""How Transformers learns about hard attention: four methods are wrapped, inert until a config carries ``hard_attention``.

``post_init``, which every model calls at the end of every way to construct it, then swaps the classes of that one model's modules and
adds its selectors. Transformers' own ``register_patch_mapping`` is not used: its ``patch_output_recorders`` rewrites class-level
recorders, so that models of the stock classes, even those built before, return no attentions any more; and it misses
``ViTModel(config)``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..api import attach_to, remove
from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from ..modeling.selector import Selector
from ..models import family_of
from ..recording import selectors


def _check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], asked: bool
) -> None:
    """Raise when a checkpoint says that it is hard and lacks its selectors; warn when it has selectors and runs soft."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Selector))
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(prefixes)) if prefixes else []
    # where no weight at all was found, the file is not of this model, and Transformers' own report says so
    if lacking and not asked and len(info["missing_keys"]) < len(model.state_dict()):
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        hub = {k: kwargs[k] for k in ("revision", "subfolder", "token", "cache_dir", "local_files_only") if k in kwargs}
        saved, _ = PreTrainedConfig.get_config_dict(place, **hub)
        if (
            saved.get("hard_attention")
            and HardAttentionConfig.parse(saved["hard_attention"]).to_dict() == model.config.hard_attention
        ):
            raise HardAttentionError(
                f"{place} says hard_attention in its config, but its weights lack {len(lacking)} selector tensors (first: '{lacking[0]}'); "
                "a hard checkpoint must hold its selectors. Load a complete checkpoint, or pass hard_attention=HardAttentionConfig(...) "
                "to train fresh ones, or hard_attention=None to load it soft."
            )
    spare = [key for key in info["unexpected_keys"] if "selector.scorer." in key]
    if spare and not asked and not prefixes:
        warnings.warn(
            f"the checkpoint holds {len(spare)} selector tensors (first: '{spare[0]}') but its config has no hard_attention: "
            "the model runs SOFT. Pass hard_attention=... to use them, or hard_attention=None to silence this.",
            stacklevel=3,
        )


def register() -> None:
    """Wrap Transformers once; called by ``import hf_hardattn``."""
    if "hard_attention" in PreTrainedConfig.__dict__:
        return
    PreTrainedConfig.hard_attention = None  # from_pretrained takes keywords its config has an attribute for
    post_init, initialize_weights = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
    from_pretrained, to_dict = PreTrainedModel.from_pretrained.__func__, PreTrainedConfig.to_dict

    @functools.wraps(post_init)
    def hard_post_init(self: PreTrainedModel) -> None:
        wanted = getattr(self.config, "hard_attention", None)
        # a class that no family knows may hold a model that one does, or be a part of one: those decide
        known = wanted is not None and family_of(self) is not None
        if known:
            attach_to(self, HardAttentionConfig.parse(wanted))
        elif wanted is None and selectors(self):
            remove(self)  # the outer config decides: hard parts of a model that was asked to be soft
        post_init(self)

    @functools.wraps(initialize_weights)
    def hard_initialize_weights(self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        if not isinstance(module, Selector):
            initialize_weights(self, module, is_custom_code)
        elif not getattr(module, "_is_hf_initialized", False):  # a custom class (the GRU, the retrievers) would skip it
            module.reset_parameters()
            module._is_hf_initialized = True

    @functools.wraps(from_pretrained)
    def hard_from_pretrained(
        cls: type[PreTrainedModel], *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        given = getattr(kwargs.get("config"), "hard_attention", None)
        asked = "hard_attention" in kwargs or isinstance(given, HardAttentionConfig)
        model, info = from_pretrained(cls, *args, output_loading_info=True, **kwargs)
        _check_loaded(model, info, args, kwargs, asked)
        return (model, info) if output_loading_info else model

    @functools.wraps(to_dict)
    def hard_to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        data = to_dict(self)
        if isinstance(data.get("hard_attention"), HardAttentionConfig):
            data["hard_attention"] = data["hard_attention"].to_dict()
        return data

    PreTrainedModel.post_init = hard_post_init
    PreTrainedModel._initialize_weights = hard_initialize_weights
    PreTrainedModel.from_pretrained = classmethod(hard_from_pretrained)
    PreTrainedConfig.to_dict = hard_to_dict
