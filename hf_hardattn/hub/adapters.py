"""PEFT adapters with selectors: ``adapter_config.json``, ``adapter_model.safetensors``, and the ``config.json`` of the hard model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from ..recording import selectors
from .building import build, headers, model_class, read_model_config
from .source import Source, fetch
from .tensors import check_finite, check_floats, read_header
from .untrusted import read_config, read_json, walk

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that import other packages, copy layers, or run an initialisation on data.
REFUSED = ("megatron_config", "layer_replication", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
# Methods that add small weights to those of the base model. Others need tokenizers, other adapters or their own code.
METHODS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "VERA", "FOURIERFT", "LN_TUNING")
# Module patterns that may not terminate in practice: a repeated group, or many repetitions.
_REPEATED_GROUP, _REPETITION, MOST_REPETITIONS = re.compile(r"\)\s*[*+{]"), re.compile(r"[*+{]|(?<!\()\?"), 5


def save_adapter(model: Any, folder: Path, base_model: str | None, base_revision: str | None) -> None:
    """Write the adapter and the configuration of the hard model.

    Raises:
        HardAttentionError: the adapter leaves out learned selectors, or the base model has no name.
    """
    from peft import get_peft_model_state_dict

    name = model.active_adapter
    adapter = model.peft_config[name]
    base = base_model or adapter.base_model_name_or_path
    if not base:
        raise HardAttentionError(
            "the adapter names no base model; loading it requires one. Pass base_model='user/name' (and base_revision)."
        )
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    saved = {tensor.data_ptr() for tensor in state.values()}
    for site, selector in selectors(model).items():
        for part, parameter in selector.named_parameters():
            if parameter.data_ptr() not in saved:
                raise HardAttentionError(
                    f"the adapter does not save '{part}' of the selector at '{site}'; it would be lost. Create it with "
                    "modules_to_save=['selector', 'input_selector']."
                )
    before = adapter.base_model_name_or_path, adapter.revision
    adapter.base_model_name_or_path, adapter.revision = base, base_revision or adapter.revision
    try:
        model.save_pretrained(folder, selected_adapters=[name])  # integrations.peft adds config.json
    finally:
        adapter.base_model_name_or_path, adapter.revision = before
    if name != "default":  # PEFT saves other names in a subfolder; a repository holds one adapter, at its top level
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()


def load_adapter(source: Source, hub: dict[str, Any], given: HardAttentionConfig | None, **kwargs: Any) -> Any:
    """Load the base model that an adapter names, make it hard, and apply the adapter.

    Args:
        hub: token, cache_dir, local_files_only for the base model.
        given: configuration that replaces the saved one; required for an adapter without config.json.

    Raises:
        HardAttentionError: no hard attention configuration, unsafe settings, missing or superfluous tensors, or a base model that
            does not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict

    where, header = source.name, read_header(source.folder / WEIGHTS, source.name)
    check_floats(header, WEIGHTS, where)
    settings = _read_settings(source, max((max(shape, default=0) for shape in header.shapes.values()), default=0))
    if not source.has("config.json") and given is None:
        raise HardAttentionError(
            f"{where} is an adapter without config.json, so its sites are unknown; PEFT alone does not write this file. Save with "
            "hf_hardattn.save(model, folder), or pass hard_attention=HardAttentionConfig(...)."
        )
    base = fetch(
        settings["base_model_name_or_path"], settings.get("revision"), **hub, remote_only=source.revision is not None
    )
    base_header = headers(base)
    if source.has("config.json"):
        # the adapter's own config.json: labels and sizes of its head, and its sites
        config, cls = read_model_config(source, base_header)
        hard = given or (read_config(config.hard_attention, where) if config.hard_attention else None)
    else:
        config, cls = read_model_config(base, base_header)
        hard = given
    if hard is None:
        raise HardAttentionError(f"config.json of {where} has no hard_attention; load this adapter with PEFT itself.")
    config.hard_attention = hard.to_dict()
    model_class(cls.__name__, where)
    model, missing = build(base, config, cls, base_header, **kwargs)
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(source.folder))
    except Exception as error:  # noqa: BLE001 - PEFT raises many types of errors for damaged files
        text = " ".join(str(error).split())[:400]
        raise HardAttentionError(
            f"the adapter {where} does not fit its base {base.name} ({type(error).__name__}: {text}); its files are damaged, or this is "
            "not its base."
        ) from error
    found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    odd = sorted(found.keys() ^ header.shapes.keys())
    if odd:
        raise HardAttentionError(
            f"{WEIGHTS} of {where} and its configuration disagree on {len(odd)} tensors (first: {odd[0][:150]!r}); they must match exactly."
        )
    check_finite(load_file(source.folder / WEIGHTS), WEIGHTS, where)
    lost = {f"base_model.model.{key}" for key in missing} - found.keys()
    if lost:
        raise HardAttentionError(
            f"{len(lost)} tensors are in neither the base {base.name} nor the adapter {where} (first: {sorted(lost)[0]!r}); an adapter of a "
            "soft base must hold its selectors (modules_to_save=['selector', 'input_selector'])."
        )
    return adapted.eval()


def _read_settings(source: Source, largest: int) -> dict[str, Any]:
    """Read and check adapter_config.json; ``largest`` is the largest dimension of any tensor of the adapter."""
    settings, where = read_json(source.folder / CONFIG, source.name), source.name
    if settings.get("peft_type") not in METHODS:
        raise HardAttentionError(
            f"{CONFIG} of {where} has peft_type={str(settings.get('peft_type'))[:100]!r}; load() supports {', '.join(METHODS)}. Load other "
            "types with PEFT itself, if you trust them."
        )
    for name in REFUSED:
        if settings.get(name):
            raise HardAttentionError(
                f"{CONFIG} of {where} sets {name!r}, which is refused; hard attention does not need it."
            )
    ranks = (
        [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
        if isinstance(settings.get("rank_pattern") or {}, dict)
        else [None]
    )
    if settings.get("peft_type") == "LORA" and not all(isinstance(r, int) and 1 <= r <= largest for r in ranks):
        raise HardAttentionError(
            f"{CONFIG} of {where} has rank {str(ranks)[:60]}; no dimension of its tensors is larger than {largest}."
        )
    for key, value in walk(settings):
        if isinstance(value, str) and (len(value) > 500 or _is_slow(value)):
            raise HardAttentionError(
                f"{CONFIG} of {where}: {key[:100]}={value[:100]!r} is not a plain name or pattern; it is refused."
            )
        if len(key) > 500 or _is_slow(key):
            raise HardAttentionError(f"{CONFIG} of {where}: the key {key[:100]!r} is not a plain name; it is refused.")
    if not isinstance(settings.get("base_model_name_or_path"), str) or not settings["base_model_name_or_path"]:
        raise HardAttentionError(f"{CONFIG} of {where} names no base model; it cannot be loaded.")
    if not isinstance(settings.get("revision"), (str, type(None))):
        raise HardAttentionError(
            f"{CONFIG} of {where}: revision={str(settings['revision'])[:100]!r} is not a valid revision."
        )
    return settings


def _is_slow(pattern: str) -> bool:
    """Whether matching a module's name against ``pattern`` could take unbounded time; PEFT accepts any regular expression."""
    return bool(_REPEATED_GROUP.search(pattern)) or len(_REPETITION.findall(pattern)) > MOST_REPETITIONS
