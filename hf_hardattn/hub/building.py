"""Build a model from untrusted files: nothing is executed, and nothing large is allocated before it is checked."""

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

# Keys that would make Transformers download kernels or import other packages.
REFUSED = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "quantization_config",
    "transformers_weights",  # a weight file other than the checked one
)
VIDEO = "hf_hardattn.backbones.video"  # BLIP for videos
MOST_LABELS = 100_000  # most labels of an adapter's own head, which may exceed the sizes of its weights
_lock, _loading, _verbosity = threading.Lock(), 0, logging.WARNING
ROOM = 2**20  # margin by which integers and parameters of a configuration may exceed its weights


def model_class(name: Any, where: str) -> type[PreTrainedModel]:
    """Return the class ``name`` if it is a supported model of Transformers or of this library."""
    # search only these packages: a name must not make Transformers import other modules
    packages = [models.load(each).spec.family.rstrip(".") for each in models.names()]
    found: Any = None
    for package in (*packages, VIDEO):
        found = found or (getattr(importlib.import_module(package), name, None) if isinstance(name, str) else None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and _is_complete(found)):
        known = ", ".join(models.names())
        raise HardAttentionError(
            f"{where} names the class {str(name)[:100]!r}; it must be a Transformers model of one of these families: {known}."
        )
    return found


def _is_complete(found: type[PreTrainedModel]) -> bool:
    """Whether a class is a complete model rather than a base class."""
    model_type = getattr(getattr(found, "config_class", None), "model_type", "")
    return bool(model_type) and found.forward is not PreTrainedModel.forward


def read_model_config(source: Source, header: Header) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Read config.json; every number in it must be plausible for the weights (``header``).

    Raises:
        HardAttentionError: unknown model type or class, refused keys, or numbers far beyond the size of the weights.
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
                f"config.json of {where} says {key}={str(value)[:40]}; its weights hold only {header.elements:,} numbers in total, so "
                "the two do not match."
            )
        # "max_window_layers" is exempt: it is a bound
        if "layers" in key and "max_" not in key and isinstance(value, int) and value > len(header.shapes):
            raise HardAttentionError(
                f"config.json of {where} says {key}={value}; its weights have only {len(header.shapes)} tensors, too few for so many layers."
            )
    labels, widest = data.get("num_labels"), max((max(shape, default=0) for shape in header.shapes.values()), default=0)
    if isinstance(labels, int) and labels > max(widest, MOST_LABELS):  # Transformers creates a name for each
        raise HardAttentionError(
            f"config.json of {where} says num_labels={labels:,}; no dimension of its weights is larger than {widest:,}."
        )
    names = data.get("architectures")
    cls = model_class(names[0] if isinstance(names, list) and names else None, f"config.json of {where}")
    kind = data.get("model_type")
    config_class: Any = cls.config_class
    if kind != config_class.model_type:
        raise HardAttentionError(
            f"config.json of {where} says model_type={str(kind)[:100]!r}; {cls.__name__} is a model of another type."
        )
    if data.get("hard_attention") is not None:
        data["hard_attention"] = read_config(data["hard_attention"], where).to_dict()
    try:
        config: Any = config_class.from_dict(data)
    except Exception as error:  # noqa: BLE001 - any wrong type in untrusted JSON
        raise _broken(where, cls, error) from error
    config._name_or_path, config._commit_hash = source.name, source.revision
    return config, cls


def build(
    source: Source, config: PreTrainedConfig, cls: type[PreTrainedModel], header: Header, **kwargs: Any
) -> tuple[Any, set[str]]:
    """Load the weights into a model of ``cls``.

    Args:
        config: configuration with the ``hard_attention`` of the model. kwargs: arguments of ``from_pretrained``.

    Returns:
        The model in evaluation mode, and the names of its tensors that the weights lack.

    Raises:
        HardAttentionError: weights that the model does not have or that have another shape, or a model much larger than its weights.
    """
    where = source.name
    if source.has("adapter_config.json"):  # from_pretrained would follow it and bypass the checks
        raise HardAttentionError(
            f"{where} contains adapter_config.json next to the weights of a model; a base model must not contain an adapter. "
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
            # an object instead of a dict: selectors that the weights lack are not an error yet
            config.hard_attention = HardAttentionConfig.parse(config.hard_attention)
        with _quiet():  # every tensor is checked below
            loaded: Any = cls.from_pretrained(
                str(source.folder), config=config, use_safetensors=True, output_loading_info=True, **kwargs
            )
        model, info = loaded
    except HardAttentionError:
        raise
    except Exception as error:  # noqa: BLE001 - Transformers raises many types of errors for damaged files
        raise _broken(where, cls, error) from error
    for kind, remedy in (("mismatched_keys", "another shape"), ("unexpected_keys", "no place in the model")):
        odd = sorted(str(key if isinstance(key, str) else key[0]) for key in info[kind])
        if odd:
            raise HardAttentionError(
                f"{len(odd)} weights of {where} have {remedy} (first: {odd[0]!r}); weights and config.json must match exactly."
            )
    check_finite(dict(model.named_parameters()), WEIGHTS, where)
    model.name_or_path = model.config._name_or_path = where  # not the path of the files in the cache
    model.config._commit_hash = source.revision
    return model, set(info["missing_keys"])


def options_of(config: PreTrainedConfig, cls: type[PreTrainedModel], header: Header, where: str) -> dict[str, bool]:
    """Infer the constructor's options besides the configuration, such as ``add_pooling_layer`` and ``use_mask_token``, from the weights.

    No file of a checkpoint names these options. Each adds weights, whose presence shows how it was set.
    """
    found = {}
    for option in inspect.signature(cls).parameters.values():
        if isinstance(option.default, bool):
            without, added = (
                set(blueprint(config, cls, header, where, **{option.name: value}).state_dict())
                for value in (False, True)
            )
            if endings := tuple(added - without):  # in a checkpoint of a larger model they have a prefix
                found[option.name] = any(name.endswith(endings) for name in header.shapes)
    return found


def blueprint(
    config: PreTrainedConfig, cls: type[PreTrainedModel], header: Header, where: str, **options: bool
) -> nn.Module:
    """Return the model on the meta device: names and shapes only, so that any configuration is cheap.

    Args:
        options: options of the constructor besides the configuration.

    Raises:
        HardAttentionError: the configuration does not define a model, or one much larger than its weights.
    """
    try:
        with torch.device("meta"):
            model = cls(copy.deepcopy(config), **options)
        count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    except HardAttentionError:
        raise
    except Exception as error:  # noqa: BLE001 - any wrong value in untrusted JSON
        raise _broken(where, cls, error) from error
    if count > 2 * header.elements + ROOM:
        raise HardAttentionError(
            f"config.json of {where} describes {count:,} parameters; its weights hold {header.elements:,}. They do not match."
        )
    return model


def check_complete(missing: set[str], where: str) -> None:
    """Raise if the weights lack tensors of the model."""
    if missing:
        first = next((key for key in sorted(missing) if "selector" in key), sorted(missing)[0])
        raise HardAttentionError(
            f"the weights of {where} lack {len(missing)} tensors (first: {first!r}); a hard checkpoint must contain all weights, "
            "those of its selectors too. Ask its owner to push it again."
        )


def headers(source: Source) -> Header:
    """Return the headers of a source's model weights."""
    return read_headers(source.folder, source.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Transformers' report of missing tensors, which is wrong if selectors or an adapter provide them.

    The verbosity belongs to the process: threads that load at the same time share one change of it, and the last one restores it.
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
