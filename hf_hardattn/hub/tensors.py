"""Look into safetensors files without reading a tensor: names, shapes, and whether the files are whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import HardAttentionError
from .untrusted import check_name, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")


@dataclass(frozen=True)
class Header:
    """Names and shapes of the tensors in one or several files."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_header(path: Path, where: str) -> Header:
    """Read the header of one file.

    Raises:
        HardAttentionError: the file is not there, cut short, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return Header({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})
    except (SafetensorError, OSError) as error:
        raise HardAttentionError(
            f"{path.name} of {where} is no whole safetensors file ({' '.join(str(error).split())[:200]}); "
            "it was cut short or damaged. Download it again (force_download), or ask its owner to push it again."
        ) from error


def read_headers(folder: Path, where: str) -> Header:
    """Read the headers of a model's weights, one file or the shards of an index.

    Raises:
        HardAttentionError: no safetensors weights; a shard that is missing, damaged, or outside the folder; a tensor that is not
            where the index says.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS, where)
    if not (folder / INDEX).is_file():
        unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE)
        found = f"only {unsafe[0]!r}, a pickle or alike that can run code" if unsafe else "none"
        raise HardAttentionError(
            f"{where} has no safetensors weights ({found}); weights are read from {WEIGHTS} or {INDEX} alone. "
            "Convert them: load the model where you trust it, then save_pretrained()."
        )
    places = read_json(folder / INDEX, where).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(value, str) for value in places.values()):
        raise HardAttentionError(f"{INDEX} of {where} has no weight_map of names; the repository is damaged.")
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(places.values())):
        if "/" in check_name(shard, where) or not shard.endswith(".safetensors"):
            raise HardAttentionError(f"{INDEX} of {where} names {shard!r}; a shard is a .safetensors file beside it.")
        shapes |= read_header(folder / shard, where).shapes
    if shapes.keys() != places.keys():
        odd = sorted(shapes.keys() ^ places.keys())
        raise HardAttentionError(
            f"{INDEX} of {where} and its shards disagree on {len(odd)} tensors (first: {odd[0][:100]!r}); they must match exactly."
        )
    return Header(shapes)
