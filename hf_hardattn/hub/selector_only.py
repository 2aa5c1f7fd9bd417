"""A repository that holds only selectors, a few kB for a named base model, like an adapter of PEFT.

``hard_attention.json`` names the base model, its revision, the model class and the configuration; ``selectors.safetensors`` holds
one tensor per parameter, named ``<site>.<parameter>``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import HardAttentionConfig
from ..errors import HardAttentionError
from ..modeling.model_config import refuse_edited_config
from ..recording import selectors
from ..version import __version__
from .building import build, headers, model_class, read_model_config
from .fingerprints import fingerprint, is_base_of
from .source import Source, fetch
from .tensors import check_finite, check_floats, read_header
from .untrusted import read_config, read_json

CONFIG, WEIGHTS, FORMAT = "hard_attention.json", "selectors.safetensors", 2


@dataclass(frozen=True)
class SelectorFile:
    """Content of ``hard_attention.json``.

    Attributes:
        base_model, base_revision: repository (or folder) and commit of the weights that the selectors belong to.
        base_sha256: fingerprint of those weights, so that selectors never run on others; see ``fingerprint``.
        model_class: class of Transformers. hard_attention: configuration. dtype: dtype of the base model's weights when saved.
        format: version of the file format; in format 1 the fingerprint does not include the names of the tensors.
    """

    base_model: str
    base_revision: str | None
    base_sha256: str
    dtype: str
    model_class: str
    hard_attention: dict[str, Any]
    hf_hardattn_version: str = ""
    format: int = FORMAT


def write_selectors(model: Any, folder: Path, base_model: str, base_revision: str | None) -> None:
    """Write ``hard_attention.json`` and ``selectors.safetensors``."""
    refuse_edited_config(model)
    content = SelectorFile(
        base_model=base_model,
        base_revision=base_revision,
        base_sha256=fingerprint(model),
        dtype=str(model.dtype),
        model_class=type(model).__name__,
        hard_attention=HardAttentionConfig.parse(model.config.hard_attention).to_dict(),
        hf_hardattn_version=__version__,
    )
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in named_tensors(model)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(asdict(content), indent=2) + "\n", encoding="utf-8")


def check_base(model: Any, base_model: str, base_revision: str | None) -> None:
    """Compare the weights that are not saved with those of the base model.

    If the base model is not on this machine, it cannot be compared; a warning says so, and ``load`` compares it.

    Raises:
        HardAttentionError: the weights differ, so the selectors would be saved without the weights that they were trained on.
    """
    try:
        base = fetch(base_model, base_revision, local_files_only=True)
        header = headers(base)
    except HardAttentionError as error:
        warnings.warn(
            f"the base model {base_model} is not on this machine, so its weights were not compared with those of the model ({error}). load() compares them.",
            stacklevel=3,
        )
        return
    config, _ = read_model_config(base, header)
    if config.hard_attention is not None:
        raise HardAttentionError(
            f"the base {base.name} has hard attention itself, but selectors alone need a base with full attention; at base_model. Save "
            "the full model (selectors_only=False), or pass the original model that the base was made from."
        )

    def reload(dtype: torch.dtype) -> Any:
        found, missing = build(base, config, type(model), header, dtype=dtype)
        if missing:
            raise _incomplete(base, type(model), missing)
        return found

    if not is_base_of(reload(torch.float32), fingerprint(model), FORMAT, str(model.dtype), reload):
        raise HardAttentionError(
            f"selectors_only=True would lose weights: those of the model differ from those of its base {base.name} (revision "
            f"{base.revision or 'of the folder'}), so more than the selectors was trained. Save the full model (selectors_only=False), or "
            "pass the base that it was loaded from."
        )


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return ``<site>.<parameter>`` and tensor of all selectors, without prefixes of compiled modules and heads used only in training."""
    return [
        (f"{site}.{name.replace('_orig_mod.', '')}", tensor)
        for site, selector in selectors(model).items()
        for name, tensor in selector.state_dict(keep_vars=True).items()
        if not name.startswith("head.")
    ]


def read_selector_file(source: Source) -> SelectorFile:
    """Read and check ``hard_attention.json``.

    Raises:
        HardAttentionError: a key is missing or unknown, a type is wrong, or the format is newer.
    """
    data, known = read_json(source.folder / CONFIG, source.name), SelectorFile.__dataclass_fields__
    if type(data.get("format")) is not int or data["format"] < 1:  # bool is a subclass of int
        raise HardAttentionError(
            f"{CONFIG} of {source.name} has format {str(data.get('format'))[:40]!r}; it must be a whole number from 1 to {FORMAT}. The file is "
            "damaged or was changed by hand."
        )
    if data["format"] > FORMAT:
        raise HardAttentionError(
            f"{CONFIG} of {source.name} has format {data['format']}; this hf_hardattn reads up to {FORMAT}. pip install -U hf-hardattn"
        )
    odd = sorted(data.keys() ^ known.keys())
    if odd:
        raise HardAttentionError(
            f"{CONFIG} of {source.name}: key {odd[0][:100]!r} is missing or unknown; it needs exactly {', '.join(known)}."
        )
    for name in ("base_model", "base_sha256", "dtype", "model_class", "hf_hardattn_version"):
        if not isinstance(data[name], str) or len(data[name]) > 500:
            raise HardAttentionError(
                f"{CONFIG} of {source.name}: {name}={str(data[name])[:100]!r} is not a valid name."
            )
    if not (data["base_revision"] is None or isinstance(data["base_revision"], str)):
        raise HardAttentionError(
            f"{CONFIG} of {source.name}: base_revision={str(data['base_revision'])[:100]!r} is not a valid revision."
        )
    read_config(data["hard_attention"], source.name)
    return SelectorFile(**data)


def load_selectors(
    source: Source, hub: dict[str, Any], given: HardAttentionConfig | None, verify_base: bool, **kwargs: Any
) -> Any:
    """Load the base model that a selector repository names, and add the selectors.

    Args:
        hub: token, cache_dir, local_files_only for the base model. given: configuration that replaces the saved one.

    Raises:
        HardAttentionError: tensors are missing, superfluous, of another shape or not finite, or the base model has other weights.
    """
    content = read_selector_file(source)
    where, header = source.name, read_header(source.folder / WEIGHTS, source.name)
    cls = model_class(content.model_class, f"{CONFIG} of {where}")
    # only a folder may name a local folder: a downloaded file must not refer to files of the user
    base = fetch(content.base_model, content.base_revision, **hub, remote_only=source.revision is not None)
    base_header = headers(base)
    config, _ = read_model_config(base, base_header)
    config.hard_attention = (given or read_config(content.hard_attention, where)).to_dict()
    model, missing = build(base, config, cls, base_header, **kwargs)
    wanted = dict(named_tensors(model))
    inside = {id(tensor) for tensor in wanted.values()}
    outside = [key for key in missing if id(_tensor(model, key)) not in inside]
    if outside:
        raise _incomplete(base, cls, outside)
    odd = sorted(wanted.keys() ^ header.shapes.keys())
    if odd:
        raise HardAttentionError(
            f"{WEIGHTS} of {where} and its configuration disagree on {len(odd)} tensors (first: {odd[0][:100]!r}); they must match exactly."
        )
    for name, tensor in wanted.items():
        if header.shapes[name] != tuple(tensor.shape):
            raise HardAttentionError(
                f"{WEIGHTS} of {where}: {name!r} has shape {header.shapes[name]}; the model needs {tuple(tensor.shape)}."
            )
    check_floats(header, WEIGHTS, where)
    values = load_file(source.folder / WEIGHTS)
    check_finite(values, WEIGHTS, where)

    def reload(dtype: torch.dtype) -> Any:
        return build(base, config, cls, base_header, dtype=dtype)[0]

    if verify_base and not is_base_of(model, content.base_sha256, content.format, content.dtype, reload):
        raise HardAttentionError(
            f"the weights of {base.name} (revision {base.revision or 'of the folder'}) are not those that the selectors of {where} were "
            "trained on; their selections would mean nothing. Ask their owner which revision it was, push the full model if the backbone was "
            "trained too, or pass verify_base=False."
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(values[name])
    return model.eval()


def _incomplete(base: Source, cls: type, missing: Collection[str]) -> HardAttentionError:
    return HardAttentionError(
        f"the base model {base.name} lacks {len(missing)} tensors of {cls.__name__} (first: {sorted(missing)[0]!r}); selectors alone "
        "need a complete base. Save and push the full model instead."
    )


def _tensor(model: nn.Module, key: str) -> Any:
    try:
        return model.get_parameter(key)
    except AttributeError:
        return None
