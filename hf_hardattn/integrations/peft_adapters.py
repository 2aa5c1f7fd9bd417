"""Training and loading adapters with PEFT: the adapter of a hard model contains its selectors and loads as a hard model.

An adapter is hard if the ``config.json`` beside it, which the module ``peft`` writes, has ``hard_attention``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..api import attach_to, remove
from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from ..modeling.adapters import add_selectors, selector_names
from ..modeling.attach import HOSTS
from ..recording import selectors
from ..unwrapping import unwrap
from .wrapping import wrap_method

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_WHOLE = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")  # weight files of a whole model
_ROOT = "base_model.model."  # prefix of the model's parameters in PEFT's files


def register() -> None:
    """Wrap PEFT and the adapters of Transformers once."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    wrap_method(BaseTuner, "inject_adapter", _inject_adapter)
    wrap_method(PeftModel, "add_adapter", _add_adapter)
    for cls in (PeftModel, PeftMixedModel):
        wrap_method(cls, "from_pretrained", _from_pretrained)
        wrap_method(cls, "load_adapter", _load_adapter)
    wrap_method(PeftAdapterMixin, "load_adapter", _load_adapter_of_transformers)


# ---------------------------------------------------------------- training: an adapter holds the selectors


def _inject_adapter(
    inject: Callable[..., Any], self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    config = self.peft_config[adapter_name]
    if not getattr(config, "inference_mode", False):  # an adapter that is loaded says itself what it holds
        add_selectors(model, config)
    return inject(self, model, adapter_name, *args, **kwargs)


def _add_adapter(
    add: Callable[..., Any], self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any
) -> Any:
    result = add(self, adapter_name, peft_config, *args, **kwargs)
    if peft_config.is_prompt_learning and not peft_config.inference_mode and selector_names(unwrap(self)):
        warnings.warn(
            f"{peft_config.peft_type.value} trains only prompts, so the selectors of hard attention are not trained. Train them first, "
            "or use a method with modules_to_save (LoRA).",
            stacklevel=3,
        )
    return result


# ---------------------------------------------------------------- loading: the adapter of a hard model makes the model hard


def _from_pretrained(
    from_pretrained: Callable[..., Any], cls: Any, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any
) -> Any:
    hub, _ = cls._split_kwargs(kwargs)
    prepare(unwrap(model), model_id, hub)
    return from_pretrained(cls, model, model_id, *args, **kwargs)


def _load_adapter(load: Callable[..., Any], self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    hub, _ = self._split_kwargs(kwargs)
    inner = unwrap(self)
    if not selectors(inner) and not _is_to_be_soft(inner) and adapter_configuration(model_id, hub) is not None:
        raise HardAttentionError(
            f"the adapter {model_id} belongs to a hard model, but the model to which it would be added is soft; the other adapters "
            "would become hard too. Load it separately, with PeftModel.from_pretrained or hf_hardattn.load."
        )
    if selectors(inner):
        check_selectors(inner, model_id, hub, complete=False)
    result = load(self, model_id, *args, **kwargs)
    _warn_of_lost_selectors(inner, model_id, result.unexpected_keys)
    return result


def _load_adapter_of_transformers(
    load: Callable[..., Any], self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any
) -> Any:
    config = kwargs.get("load_config")
    place = peft_model_id or getattr(config, "pretrained_model_name_or_path", None)
    if place is not None:
        hub = {**(getattr(config, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {})}
        prepare(self, place, hub)
    result = load(self, peft_model_id, *args, **kwargs)
    _warn_of_lost_selectors(self, place, result.unexpected_keys)
    return result


def prepare(model: Any, place: Any, hub: Mapping[str, Any]) -> None:
    """Make a soft model hard before the adapter of a hard model is loaded; check that a hard one has the adapter's selectors.

    A model that was loaded with ``hard_attention=None`` stays soft. A model that is already hard keeps its own configuration.

    Args:
        place: folder or repository of the adapter. hub: token, revision and similar options.

    Raises:
        HardAttentionError: the adapter's selectors are incomplete, or do not fit the model.
    """
    if _is_to_be_soft(model):
        return
    if selectors(model):
        check_selectors(model, place, hub, complete=False)
        return
    hard = adapter_configuration(place, hub)
    if hard is None:
        return
    attach_to(model, hard, fresh=True)
    try:
        check_selectors(model, place, hub, complete=True)
    except HardAttentionError:
        remove(model)
        raise


def check_selectors(model: nn.Module, place: Any, hub: Mapping[str, Any], *, complete: bool) -> None:
    """Raise if an adapter holds selectors that the model lacks, or (with ``complete``) lacks some that the model has.

    Args:
        place: folder or repository of the adapter. hub: token, revision and similar options.
    """
    from peft.utils import load_peft_weights

    file = load_peft_weights(str(place), device="cpu", **_options(hub))
    held = {_without_copies(key) for key in file if _is_of_selector(key)}
    wanted = _selector_keys(model)
    spare, lacking = sorted(held - wanted), sorted(wanted - held) if complete else []
    if spare:
        raise HardAttentionError(
            f"the adapter {place} holds {len(spare)} selector tensors that the model does not have (first: '{spare[0]}'); its sites or "
            "scorers differ from the model's. Load it onto its own base model, which then uses the adapter's hard_attention."
        )
    if lacking:
        raise HardAttentionError(
            f"the adapter {place} has hard_attention in its config.json, but lacks {len(lacking)} selector tensors (first: "
            f"'{lacking[0]}'), which its base does not have either. Train it with modules_to_save=['selector', 'input_selector'], or load "
            "the base with hard_attention=None to use the adapter soft."
        )


def _is_of_selector(key: str) -> bool:
    return any(f".{name}." in key for name in HOSTS)


def _selector_keys(model: nn.Module) -> set[str]:
    """Return the names that the parameters of the model's selectors have in an adapter file."""
    return {_ROOT + _without_copies(name) for name, _ in model.named_parameters() if _is_of_selector(f".{name}")}


def _without_copies(name: str) -> str:
    """Return the name that a parameter has in the base model, whichever of PEFT's copies it belongs to; files may name these too."""
    return re.sub(r"\.original_module(?=\.)|\.modules_to_save\.[^.]+(?=\.)", "", name)


def _is_to_be_soft(model: Any) -> bool:
    """Whether the user requested a soft model, with ``hard_attention=None``."""
    return vars(model.config).get("hard_attention", ...) is None if hasattr(model, "config") else False


def _warn_of_lost_selectors(model: Any, place: Any, unexpected: Iterable[str]) -> None:
    lost = [key for key in unexpected if "selector.scorer." in key]
    if lost and not selectors(model) and not _is_to_be_soft(model):
        warnings.warn(
            f"the adapter {place} holds {len(lost)} selector tensors (first: '{lost[0]}') but no config.json with hard_attention: "
            "the model runs SOFT. Load the base with hard_attention=... to use them, or with hard_attention=None to silence this.",
            stacklevel=4,
        )


def _options(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for finding a file of a repository that both PEFT and Transformers accept."""
    known = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    return {name: hub[name] for name in known if hub.get(name) is not None}


def adapter_configuration(place: Any, hub: Mapping[str, Any]) -> HardAttentionConfig | None:
    """Return the hard configuration beside an adapter, in a folder or on the Hub, or None if there is none."""
    from transformers.utils import cached_file

    file = cached_file(
        str(place),
        CONFIG,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **_options(hub),
    )
    found = None if file is None else json.loads(Path(file).read_text(encoding="utf-8")).get("hard_attention")
    return None if found is None else HardAttentionConfig.parse(found)


def base_of_adapter(place: Any) -> dict[str, Any] | None:
    """Return the base of an adapter whose folder Transformers would take for a whole model, because of its hard ``config.json``.

    Returns:
        Name and revision of the base; None for any other folder or repository.
    """
    folder = Path(place) if isinstance(place, (str, Path)) else None
    if folder is None or not (folder / ADAPTER_CONFIG).is_file() or not (folder / CONFIG).is_file():
        return None
    if any(next(folder.glob(pattern), None) is not None for pattern in _WHOLE):
        return None
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    return {"name": base, "revision": settings.get("revision")} if base else None
