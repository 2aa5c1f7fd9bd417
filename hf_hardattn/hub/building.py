"""Build a model from files that somebody else wrote: nothing is executed, nothing large is allocated before it was checked."""

from __future__ import annotations

import copy
import importlib
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .. import models
from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from .source import Source
from .tensors import WEIGHTS, Header, check_finite, check_floats, read_headers
from .untrusted import read_config, read_json, walk

# Keys that would make Transformers fetch kernels or bring in other packages.
REFUSED = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "quantization_config",
    "transformers_weights",  # another file of weights than the one that was looked at
)
VIDEO = "hf_hardattn.backbones.video"  # BLIP that reads videos
MOST_LABELS = 100_000  # that an adapter's own head may have beyond its base
_lock, _loading, _verbosity = threading.Lock(), 0, logging.WARNING
ROOM = 2**20  # integers and parameters that a configuration may name beyond what its weights hold


def model_class(name: Any, where: str) -> type[PreTrainedModel]:
    """The class called ``name``, if it is one of Transformers' own models, or of ours, that hard attention serves."""
    # looked up in these packages alone: a name must not make Transformers import whatever else it knows
    packages = [models.load(each).spec.family.rstrip(".") for each in models.names()]
    found: Any = None
    for package in (*packages, VIDEO):
        found = found or (getattr(importlib.import_module(package), name, None) if isinstance(name, str) else None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and _is_complete(found)):
        known = ", ".join(models.names())
        raise HardAttentionError(
            f"{where} names the class {str(name)[:100]!r}; it must be one of Transformers' models of: {known}."
        )
    return found


def _is_complete(found: type[PreTrainedModel]) -> bool:
    """Whether a class makes models, and is not only a base of others."""
    model_type = getattr(getattr(found, "config_class", None), "model_type", "")
    return bool(model_type) and found.forward is not PreTrainedModel.forward


def read_model_config(source: Source, header: Header) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Read config.json; every number in it must be plausible beside the weights (``header``).

    Raises:
        HardAttentionError: unknown model type or class, refused keys, numbers far beyond what the weights hold.
    """
    data, where = read_json(source.folder / "config.json", source.name), source.name
    refused = sorted(key for key, value in _all_keys(data) if key in REFUSED and value is not None)
    if refused:
        raise HardAttentionError(
            f"config.json of {where} sets {refused[0]!r}; that would load other code, so it is refused. Pass attn_implementation to "
            "load() yourself if you want one."
        )
    limit = max(header.elements, ROOM)
    for key, value in walk({key: value for key, value in data.items() if key != "hard_attention"}):
        if isinstance(value, (int, float)) and abs(value) > limit:
            raise HardAttentionError(
                f"config.json of {where} says {key}={str(value)[:40]}; its weights hold {header.elements:,} numbers in all, so that "
                "cannot be theirs."
            )
        # but "max_window_layers", a bound
        if "layers" in key and "max_" not in key and isinstance(value, int) and value > len(header.shapes):
            raise HardAttentionError(
                f"config.json of {where} says {key}={value}; its weights are {len(header.shapes)} tensors, too few for so many layers."
            )
    labels, widest = data.get("num_labels"), max((max(shape, default=0) for shape in header.shapes.values()), default=0)
    if isinstance(labels, int) and labels > max(widest, MOST_LABELS):  # Transformers makes a name for each
        raise HardAttentionError(
            f"config.json of {where} says num_labels={labels:,}; no tensor of its weights has a dimension above {widest:,}."
        )
    names = data.get("architectures")
    cls = model_class(names[0] if isinstance(names, list) and names else None, f"config.json of {where}")
    kind = data.get("model_type")
    config_class: Any = cls.config_class
    if kind != config_class.model_type:
        raise HardAttentionError(f"config.json of {where} says model_type={str(kind)[:100]!r}; {cls.__name__} is none.")
    if data.get("hard_attention") is not None:
        data["hard_attention"] = read_config(data["hard_attention"], where).to_dict()
    try:
        config: Any = config_class.from_dict(data)
    except Exception as error:  # noqa: BLE001 - any wrong type in somebody's JSON
        raise _broken(where, cls, error) from error
    config._name_or_path, config._commit_hash = source.name, source.revision
    return config, cls


def build(
    source: Source, config: PreTrainedConfig, cls: type[PreTrainedModel], header: Header, **kwargs: Any
) -> tuple[Any, set[str]]:
    """Load the weights into a model of ``cls``.

    Args:
        config: with ``hard_attention`` as the model is to have it. kwargs: of ``from_pretrained``.

    Returns:
        The model in evaluation mode, and the names of its tensors that the weights lack.

    Raises:
        HardAttentionError: weights that the model does not have, or of another shape; a model much larger than its weights.
    """
    where = source.name
    if source.has("adapter_config.json"):  # from_pretrained would follow it, past every check
        raise HardAttentionError(
            f"{where} holds adapter_config.json beside the weights of a model; a base model is whole, without an adapter of its own. "
            "Merge the adapter (merge_and_unload) and save the result, or remove the file."
        )
    kwargs = options_of(config, cls, header, where) | kwargs
    whole_numbers = {
        name.rpartition(".")[2]
        for name, buffer in blueprint(config, cls, header, where).named_buffers()
        if not buffer.is_floating_point()
    }
    check_floats(header, WEIGHTS, where, whole_numbers)
    try:
        if config.hard_attention is not None:
            # an object, not a dict, says: selectors that the weights lack are no error yet
            config.hard_attention = HardAttentionConfig.parse(config.hard_attention)
        with _quiet():  # every tensor is accounted for below
            loaded: Any = cls.from_pretrained(
                str(source.folder), config=config, use_safetensors=True, output_loading_info=True, **kwargs
            )
        model, info = loaded
    except HardAttentionError:
        raise
    except Exception as error:  # noqa: BLE001 - Transformers answers damaged files with many kinds of error
        raise _broken(where, cls, error) from error
    for kind, remedy in (("mismatched_keys", "another shape"), ("unexpected_keys", "no place in the model")):
        odd = sorted(str(key if isinstance(key, str) else key[0]) for key in info[kind])
        if odd:
            raise HardAttentionError(
                f"{len(odd)} weights of {where} have {remedy} (first: {odd[0]!r}); weights and config.json must match exactly."
            )
    check_finite(dict(model.named_parameters()), WEIGHTS, where)
    model.name_or_path = model.config._name_or_path = where  # not the place of the files in somebody's cache
    model.config._commit_hash = source.revision
    return model, set(info["missing_keys"])


def options_of(config: PreTrainedConfig, cls: type[PreTrainedModel], header: Header, where: str) -> dict[str, bool]:
    """What the constructor takes beside the configuration, such as ``add_pooling_layer`` and ``use_mask_token``, as the weights have it.

    No file of a checkpoint names these options; each adds weights, and whether they are there says how it was set.
    """
    found = {}
    for option in inspect.signature(cls).parameters.values():
        if isinstance(option.default, bool):
            without, added = (
                set(blueprint(config, cls, header, where, **{option.name: value}).state_dict())
                for value in (False, True)
            )
            if endings := tuple(added - without):  # a checkpoint of a larger model has a prefix in front of them
                found[option.name] = any(name.endswith(endings) for name in header.shapes)
    return found


def blueprint(
    config: PreTrainedConfig, cls: type[PreTrainedModel], header: Header, where: str, **options: bool
) -> nn.Module:
    """The model on the meta device: names and shapes only, so whatever the configuration says, it costs nothing.

    Args:
        options: of the constructor, beside the configuration.

    Raises:
        HardAttentionError: a configuration that makes no model, or one much larger than its weights.
    """
    try:
        with torch.device("meta"):
            model = cls(copy.deepcopy(config), **options)
        count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    except HardAttentionError:
        raise
    except Exception as error:  # noqa: BLE001 - any wrong value in somebody's JSON
        raise _broken(where, cls, error) from error
    if count > 2 * header.elements + ROOM:
        raise HardAttentionError(
            f"config.json of {where} describes {count:,} parameters; its weights hold {header.elements:,}. They do not belong together."
        )
    return model


def check_complete(missing: set[str], where: str) -> None:
    """Raise for tensors that the weights lack."""
    if missing:
        first = next((key for key in sorted(missing) if "selector" in key), sorted(missing)[0])
        raise HardAttentionError(
            f"the weights of {where} lack {len(missing)} tensors (first: {first!r}); a hard checkpoint must hold its selectors and "
            "everything else. Ask its owner to push it again."
        )


def headers(source: Source) -> Header:
    """The headers of a source's model weights."""
    return read_headers(source.folder, source.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' report of missing tensors, which is wrong where selectors or an adapter bring them.

    The verbosity is the process's: threads that load at the same time share one change of it, and the last one takes it back.
    """
    global _loading, _verbosity
    with _lock:
        if not _loading:
            _verbosity = logging.get_verbosity()
            logging.set_verbosity_error()
        _loading += 1
    try:
        yield
    finally:
        with _lock:
            _loading -= 1
            if not _loading:
                logging.set_verbosity(_verbosity)


def _all_keys(data: Any) -> list[tuple[str, Any]]:
    if isinstance(data, dict):
        return [*data.items(), *(pair for value in data.values() for pair in _all_keys(value))]
    return [pair for value in data for pair in _all_keys(value)] if isinstance(data, list) else []


def _broken(where: str, cls: type, error: Exception) -> HardAttentionError:
    text = " ".join(str(error).split())[:400]
    return HardAttentionError(
        f"{where} cannot be loaded as {cls.__name__} ({type(error).__name__}: {text}); its files are damaged or were changed by hand."
    )
