"""Integration into Transformers: methods of its models, configurations and caches are wrapped, without effect on a stock model.

The wrapper of ``post_init``, which every model calls at the end of its construction, adds the hooks and selectors of that model.
Transformers' own ``register_patch_mapping`` is not used: its ``patch_output_recorders`` rewrites class-level recorders, so that
models of the stock classes, even those built before, no longer return attentions. It also misses ``ViTModel(config)``.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..api import attach_to, remove
from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from ..fields import is_configuration
from ..modeling.cache import follow
from ..modeling.checkpointing import without_reentry
from ..modeling.context import Mode, active
from ..modeling.selector import Selector
from ..models import family_of, why_unknown
from ..recording import selectors
from . import peft, peft_adapters
from .peft_adapters import CONFIG, base_of_adapter, check_selectors
from .wrapping import wrap_method

SELECTORS = "hard_attention.json"  # written by save(selectors_only=True) instead of config.json
_ADVICE = "Pass hard_attention=... to use them, or hard_attention=None to silence this."


def _check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], place: Any, kwargs: Mapping[str, Any], asked: bool
) -> None:
    """Raise if a checkpoint is hard by its config but lacks its selectors; warn if it has selectors but runs soft."""
    if asked or getattr(model, "_hf_peft_config_loaded", False):  # an adapter's tensors were checked when it was loaded
        return
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Selector))
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(prefixes)) if prefixes else []
    # If no weight at all was found, the file belongs to another model, and Transformers' own report says so.
    if lacking and not info["missing_keys"] >= dict(model.named_parameters()).keys():
        saved = _saved_hard_attention(place, kwargs)
        if saved and HardAttentionConfig.parse(saved).to_dict() == model.config.hard_attention:
            raise HardAttentionError(
                f"{place} has hard_attention in its config, but its weights lack {len(lacking)} selector tensors (first: '{lacking[0]}'); "
                "a hard checkpoint must contain its selectors. Load a complete checkpoint, or pass hard_attention=HardAttentionConfig(...) "
                "to train new ones, or hard_attention=None to load it soft."
            )
    spare = [key for key in info["unexpected_keys"] if "selector.scorer." in key]
    modules = (
        {name for name, _ in model.named_modules()} if prefixes else set()
    )  # tensors of a tower that the class does not have are not missed
    forgotten = [key for key in spare if re.sub(r"(?:^|\.)(?:input_)?selector\.scorer\..*", "", key) in modules]
    if forgotten:
        raise HardAttentionError(
            f"{place} holds {len(forgotten)} selector tensors (first: '{forgotten[0]}') for sites that are not in its config, so the "
            f"model would select at fewer sites than it was trained with. {_ADVICE}"
        )
    if spare and not prefixes:
        warnings.warn(
            f"the checkpoint holds {len(spare)} selector tensors (first: '{spare[0]}') but its config has no hard_attention: "
            f"the model runs SOFT. {_ADVICE}",
            stacklevel=4,
        )


def _saved_hard_attention(place: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return ``hard_attention`` of the checkpoint's own config.json; None if there is no file, as when a state dict was passed."""
    if place is None:
        return None
    hub = {k: kwargs[k] for k in ("revision", "subfolder", "token", "cache_dir", "local_files_only") if k in kwargs}
    try:
        saved, _ = PreTrainedConfig.get_config_dict(place, **hub)
    except OSError:
        return None
    return saved.get("hard_attention")


def _asks(config: Any) -> bool:
    """Whether the caller set ``hard_attention`` in ``config``, where the Auto classes put the keyword.

    A dict comes from a checkpoint and not from the caller. Without any setting, the config has no such attribute of its own.
    """
    given = getattr(config, "__dict__", {})
    return "hard_attention" in given and not isinstance(given["hard_attention"], Mapping)


def _post_init(post_init: Callable[..., Any], self: PreTrainedModel) -> None:
    wanted = getattr(self.config, "hard_attention", None)
    # A class that no family supports may contain, or be part of, a model that one does; that model then decides.
    known = wanted is not None and family_of(self) is not None
    if known:
        attach_to(self, HardAttentionConfig.parse(wanted), is_part=_is_part(self))
    elif wanted is not None and not _is_part(self):
        raise HardAttentionError(
            f"no family supports {type(self).__name__}, so hard attention cannot be applied and it would run soft; "
            f"{why_unknown(self)}. Leave hard_attention out, or pass hard_attention=None if its config.json has it."
        )
    elif wanted is None and selectors(self):
        remove(self)  # the outer config decides: this removes the sites of hard parts if the whole model is to be soft
    post_init(self)


def _is_part(model: PreTrainedModel) -> bool:
    """Whether the model is being built in the ``__init__`` of another one, which attaches the sites once it is complete."""
    frame = inspect.currentframe()
    while frame is not None:
        builder = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(builder, PreTrainedModel) and builder is not model:
            return True
        frame = frame.f_back
    return False


def _initialize_weights(
    initialize_weights: Callable[..., Any], self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False
) -> None:
    if not isinstance(module, Selector):
        initialize_weights(self, module, is_custom_code)
    elif not getattr(module, "_is_hf_initialized", False):  # a custom class (the GRU, the retrievers) would skip it
        module.reset_parameters()
        module._is_hf_initialized = True


def _set_gradient_checkpointing(set_checkpointing: Callable[..., Any], self: PreTrainedModel, **kwargs: Any) -> None:
    function = kwargs.get("gradient_checkpointing_func")
    if function is not None and selectors(self):
        kwargs["gradient_checkpointing_func"] = without_reentry(function)
    set_checkpointing(self, **kwargs)


# While Transformers loads a model, it replaces functions for the whole process, including weight tying. If two threads loaded at the
# same time, the second would take the replacement for the original and restore that: no later model would tie its weights.
_loading = threading.RLock()


def _from_pretrained(
    from_pretrained: Callable[..., Any],
    cls: type[PreTrainedModel],
    *args: Any,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    asked = "hard_attention" in kwargs or _asks(kwargs.get("config"))
    place = args[0] if args else kwargs.pop("pretrained_model_name_or_path", None)
    adapter = base_of_adapter(place)
    if adapter is not None:
        kwargs = _through_base(adapter, place, kwargs)
    with _loading:
        model, info = from_pretrained(
            cls, place if adapter is None else adapter["name"], *args[1:], output_loading_info=True, **kwargs
        )
    if adapter is None:
        _check_loaded(model, info, place, kwargs, asked)
    elif selectors(model) and _saved_hard_attention(adapter["name"], kwargs) is None:
        check_selectors(model, place, {}, complete=True)  # the base has none, so the adapter must hold all
    return (model, info) if output_loading_info else model


def _through_base(adapter: Mapping[str, Any], folder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that load an adapter's base with the configuration in the adapter's folder, and then the adapter."""
    known = {**kwargs, "config": kwargs.get("config") or str(folder)}
    known["adapter_kwargs"] = {**(kwargs.get("adapter_kwargs") or {}), "_adapter_model_path": str(folder)}
    if adapter["revision"]:
        known["revision"] = adapter["revision"]
    return known


def _to_dict(to_dict: Callable[..., Any], self: PreTrainedConfig) -> dict[str, Any]:
    data: dict[str, Any] = to_dict(self)
    if is_configuration(data.get("hard_attention")):
        data["hard_attention"] = data["hard_attention"].to_dict()
    return data


def _get_config_dict(
    get_config_dict: Callable[..., Any], cls: type[PreTrainedConfig], place: Any, *args: Any, **kwargs: Any
) -> Any:
    folder = Path(place) if isinstance(place, (str, Path)) else None
    if folder is not None and (folder / SELECTORS).is_file() and not (folder / CONFIG).is_file():
        raise HardAttentionError(
            f"{place} holds only selectors, without a model; {SELECTORS} names their base. Load both with hf_hardattn.load({str(place)!r})."
        )
    return get_config_dict(cls, place, *args, **kwargs)


def _take_examples(take: Callable[..., None], self: Cache, *args: Any, **kwargs: Any) -> None:
    take(self, *args, **kwargs)
    (order,) = (*args, *kwargs.values())
    follow(self, lambda rows: rows[order.to(rows.device) if isinstance(order, Tensor) else order])


def _repeat_examples(repeat: Callable[..., None], self: Cache, repeats: int) -> None:
    repeat(self, repeats)
    follow(self, lambda rows: rows.repeat_interleave(repeats, 0))


def _assisted_decoding(decode: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if not selectors(self):
        return decode(self, *args, **kwargs)
    with active(Mode({}, assisted=True)):
        return decode(self, *args, **kwargs)


def register() -> None:
    """Wrap Transformers once; called by ``import hf_hardattn``."""
    PreTrainedConfig.hard_attention = None  # from_pretrained accepts keywords for which its config has an attribute
    wrap_method(PreTrainedModel, "post_init", _post_init)
    wrap_method(PreTrainedModel, "_initialize_weights", _initialize_weights)
    wrap_method(PreTrainedModel, "_set_gradient_checkpointing", _set_gradient_checkpointing)
    wrap_method(PreTrainedModel, "from_pretrained", _from_pretrained)
    wrap_method(PreTrainedConfig, "to_dict", _to_dict)
    wrap_method(PreTrainedConfig, "get_config_dict", _get_config_dict)
    wrap_method(GenerationMixin, "_assisted_decoding", _assisted_decoding)
    for cache in (Cache, EncoderDecoderCache):
        wrap_method(cache, "reorder_cache", _take_examples)
        wrap_method(cache, "batch_select_indices", _take_examples)
        wrap_method(cache, "batch_repeat_interleave", _repeat_examples)
    peft.register()
    peft_adapters.register()
