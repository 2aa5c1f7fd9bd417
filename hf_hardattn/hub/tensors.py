"""Read the headers of safetensors files without their tensors: names, shapes, and whether the files are complete."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import HardAttentionError
from .untrusted import check_name, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS, INTEGERS = ("F64", "F32", "F16", "BF16"), ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")


@dataclass(frozen=True)
class Header:
    """Names, shapes and dtypes (in the notation of safetensors, ``F32``) of the tensors in one or several files."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Total number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_header(path: Path, where: str) -> Header:
    """Read the header of one file.

    Raises:
        HardAttentionError: the file does not exist, is truncated, or is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            header = Header(
                {key: tuple(found.get_shape()) for key, found in slices.items()},
                {key: str(found.get_dtype()) for key, found in slices.items()},
            )
    except (SafetensorError, OSError) as error:
        raise HardAttentionError(
            f"{path.name} of {where} is not a complete safetensors file ({' '.join(str(error).split())[:200]}); "
            "it was truncated or damaged. Download it again (force_download), or ask its owner to push it again."
        ) from error
    odd = sorted(key for key, dtype in header.dtypes.items() if dtype not in (*FLOATS, *INTEGERS))
    if odd:
        raise HardAttentionError(
            f"{path.name} of {where}: {odd[0][:150]!r} is of dtype {header.dtypes[odd[0]]}; weights must be {', '.join(FLOATS)}. Save "
            "them in one of these."
        )
    return header


def check_floats(header: Header, path_name: str, where: str, besides: Collection[str] = ()) -> None:
    """Raise for weights that are integers: cast to the model's dtype they would be different weights.

    Args:
        besides: last parts of the names of tensors that are integers in the model as well.

    Raises:
        HardAttentionError: there are such weights; the message names the first one.
    """
    odd = sorted(
        key for key, dtype in header.dtypes.items() if dtype not in FLOATS and key.rpartition(".")[2] not in besides
    )
    if odd:
        raise HardAttentionError(
            f"{path_name} of {where}: {odd[0][:150]!r} is of dtype {header.dtypes[odd[0]]}; the model needs {', '.join(FLOATS)}. Save "
            "the weights in one of these; load quantised ones with from_pretrained."
        )


def check_finite(tensors: Mapping[str, Tensor], name: str, where: str) -> None:
    """Raise for the first tensor with a NaN or infinite value; tensors without values (device ``meta``) are skipped."""
    for key, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise HardAttentionError(
                f"{name} of {where}: {key[:150]!r} holds values that are not finite; the file is damaged, or the training diverged. "
                "Ask its owner for an earlier checkpoint."
            )


def read_headers(folder: Path, where: str) -> Header:
    """Read the headers of a model's weights, from one file or from the shards of an index.

    Raises:
        HardAttentionError: there are no safetensors weights, a shard is missing, damaged or outside the folder, or a tensor is not in
            the shard that the index names.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS, where)
    if not (folder / INDEX).is_file():
        unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE)
        found = f"only {unsafe[0]!r}, a pickle or similar file that can run code" if unsafe else "none"
        raise HardAttentionError(
            f"{where} has no safetensors weights ({found}); weights are read only from {WEIGHTS} or {INDEX}. "
            "Convert them: load the model where you trust it, then save_pretrained()."
        )
    places = read_json(folder / INDEX, where).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(value, str) for value in places.values()):
        raise HardAttentionError(f"{INDEX} of {where} has no weight_map of names; the repository is damaged.")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for shard in sorted(set(places.values())):
        if "/" in check_name(shard, where) or not shard.endswith(".safetensors"):
            raise HardAttentionError(
                f"{INDEX} of {where} names {shard!r}; a shard must be a .safetensors file next to it."
            )
        header = read_header(folder / shard, where)
        shapes |= header.shapes
        dtypes |= header.dtypes
    if shapes.keys() != places.keys():
        odd = sorted(shapes.keys() ^ places.keys())
        raise HardAttentionError(
            f"{INDEX} of {where} and its shards disagree on {len(odd)} tensors (first: {odd[0][:100]!r}); they must match exactly."
        )
    return Header(shapes, dtypes)
