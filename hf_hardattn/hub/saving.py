"""``save``: write a hard model in a form that ``load`` and the Hub can read completely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import nn

from ..errors import HardAttentionError
from ..recording import selectors
from ..unwrapping import refuse_sharded
from . import adapters, selector_only
from .remote_code import add_stub
from .replacing import replaced

# Weights of an earlier save with other shards; if they remained, they could be loaded instead.
OLD_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PREFIXES = ("_orig_mod.",)  # added to names by torch.compile; the wrapper of DDP is removed as a whole


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    selectors_only: bool = False,
    base_model: str | None = None,
    base_revision: str | None = None,
    max_shard_size: str | int = "5GB",
    remote_code_stub: bool = False,
    verify_base: bool = True,
) -> Path:
    """Save a hard model in one of three forms; ``load(folder)`` reads each.

    Args:
        model: hard model, possibly wrapped by DDP or compiled; a PEFT model is saved as its adapter with the hard configuration.
        folder: created if necessary. Files of the same names are replaced together: an error or a killed process leaves the old ones.
        selectors_only: save only the selectors, a few kB, to be loaded on ``base_model``. Use this if the backbone was not trained:
            the file stores a hash of the base model's weights, and ``load`` refuses others.
        base_model: base model of the selectors or the adapter; by default the model that was loaded.
        base_revision: revision of the base model. Name a commit, because a branch moves.
        max_shard_size: maximum size of the files of a full checkpoint.
        remote_code_stub: add a file to a full checkpoint that, under ``trust_remote_code=True``, names the package to install.
        verify_base: with ``selectors_only``, compare the model's other weights with those of ``base_model`` if it is on this machine.

    Returns:
        The folder.

    Raises:
        HardAttentionError: the model has no hard attention, the base model has no name or other weights, the adapter lacks its
            selectors, the folder holds another form, or the disk is full.
    """
    folder, inner = Path(folder), unwrap(model)
    if not selectors(inner):
        raise HardAttentionError(
            f"{type(inner).__name__} has no hard-attention sites; save() is for hard models. Call apply() first, or save_pretrained()."
        )
    refuse_sharded(inner, "save")
    adapter = hasattr(inner, "peft_config")
    for form, name in (("selectors alone", selector_only.CONFIG), ("an adapter", adapters.CONFIG)):
        mine = selectors_only if name == selector_only.CONFIG else adapter
        if not mine and (folder / name).exists():  # load() reads these files first
            raise HardAttentionError(
                f"{folder} holds {name}, so load() would still read it as {form}; a folder holds one form. Save to another, or remove that file."
            )
    if adapter:
        if selectors_only:
            raise HardAttentionError(
                "selectors_only=True of a PEFT model would leave its adapter out. Save the adapter (selectors_only=False), or "
                "merge_and_unload() first and save the full model."
            )
        with replaced(folder, "the adapter") as place:
            adapters.save_adapter(inner, place, base_model, base_revision)
        return folder
    if not selectors_only:
        state = {_stripped(name): tensor for name, tensor in _weights(inner).items()}
        with replaced(folder, "the model", drop=OLD_WEIGHTS) as place:
            inner.save_pretrained(place, state_dict=state, max_shard_size=max_shard_size)
            if remote_code_stub:
                add_stub(place)
        return folder
    base = base_model or inner.name_or_path
    if not base:
        raise HardAttentionError(
            "selectors_only=True has no base model; loading the selectors requires one. Pass base_model='user/name' (and base_revision)."
        )
    revision = base_revision or (None if base_model else getattr(inner.config, "_commit_hash", None))
    if verify_base:
        selector_only.check_base(inner, str(base), revision)
    with replaced(folder, "the selectors") as place:
        selector_only.write_selectors(inner, place, str(base), revision)
    return folder


def unwrap(model: nn.Module) -> Any:
    """Return the model without the wrappers of DDP, FSDP or torch.compile."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _weights(model: nn.Module) -> dict[str, Any]:
    """Return the state dict, including weights that Accelerate has offloaded."""
    offloaded = any(weight.is_meta for weight in model.parameters())
    return get_state_dict_offloaded_model(model) if offloaded else model.state_dict()


def _stripped(name: str) -> str:
    for prefix in PREFIXES:
        name = name.replace(prefix, "")
    return name
