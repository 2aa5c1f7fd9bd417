"""One layer of a Transformers cache, as an attention with selection uses it, and the choices stored with the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from .prompt_memory import MEMORY
from .state import KeySubset

MEMO = "hard_attention_kept"  # attribute of a cache: dict from site to the KeySubset chosen in the first step


class CacheLayer:
    """Keys and values of one layer.

    Attributes:
        store: a Transformers ``Cache``. layer: index in it.
        filled: the keys of a cross-attention are already cached.
        past: positions cached before this call.
    """

    def __init__(self, store: Any, layer: int, *, cross: bool):
        self.owner, self.layer, self.cross = store, layer, cross
        self.filled = False
        self.past: int | Tensor = 0
        if isinstance(store, EncoderDecoderCache):
            self.filled = cross and bool(store.is_updated.get(layer))
            store = store.cross_attention_cache if cross else store.self_attention_cache
        self.store = store
        if not cross:
            past = store.get_seq_length(layer)
            # a static cache returns the very counter that the next update changes
            self.past = past.clone() if isinstance(past, Tensor) else past

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the cached keys and values."""
        return self.store.layers[self.layer].keys, self.store.layers[self.layer].values

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return all of them."""
        if self.cross:
            resize_static_layer(self.store, self.layer, key.shape[2])
        found = self.store.update(key, value, self.layer)
        if self.cross and isinstance(self.owner, EncoderDecoderCache):
            self.owner.is_updated[self.layer] = True
        return found

    def mark_passed(self, size: int, heads: int, passed: Tensor) -> None:
        """Mark positions that monotonic attention has passed, bool ``[B, heads, N]``, in the last feature of the cached keys.

        Args:
            size: d, number of columns of the keys themselves; the features follow them.
        """
        layer = self.store.layers[self.layer]
        features = unpack_features(layer.keys[..., size:], heads).clone()
        features[..., -1] += passed
        if layer.keys.requires_grad:
            # autograd needs the keys of a training forward, so do not write in place
            layer.keys = pack_features(features, layer.keys[..., :size])
        else:
            layer.keys[..., size:] = pack_features(features, layer.keys[..., :size])[..., size:]


def resize_static_layer(store: Any, layer: int, keys: int) -> None:
    """Resize the static cache layer of a cross-attention to the number of keys that it will hold instead of all source rows."""
    if not store.is_compileable or layer >= len(store.layers):
        return
    slot = store.layers[layer]
    if slot.max_cache_len != keys:
        slot.max_cache_len, slot.is_initialized = keys, False  # the next update allocates its tensors


def remembered(cache: Any, site: str) -> KeySubset | None:
    """Return the keys that ``site`` kept when the cache was filled."""
    return getattr(cache, MEMO, {}).get(site)


def remember(cache: Any, site: str, keys: KeySubset) -> None:
    """Store the choice of ``site`` with the cached keys."""
    if not hasattr(cache, MEMO):
        setattr(cache, MEMO, {})
    getattr(cache, MEMO)[site] = keys


def follow(cache: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change the examples of what is stored with a cache as those of the cache itself were changed.

    Args:
        change: function from a tensor ``[B, ...]`` to one of the cache's examples now, ``[B', ...]``.
    """

    def changed(stored: Any) -> Any:
        return change(stored) if isinstance(stored, Tensor) else stored

    memo: dict[str, KeySubset] = getattr(cache, MEMO, {})
    for site, keys in memo.items():
        memo[site] = KeySubset._make(map(changed, keys))
    memory = getattr(cache, MEMORY, None)
    if memory is not None:
        memory.map(changed)


def pack_features(features: Tensor, key: Tensor) -> Tensor:
    """Append the scorer's features, fp32 ``[B, H or 1, N, F]``, to the keys ``[B, H, N, d]`` as extra columns.

    A half-precision cache stores the bits of each fp32 number in two columns, so that nothing is rounded: the same positions are kept
    with the cache and without it. The columns follow every reordering and cropping of the keys.
    """
    features = features.contiguous().view(key.dtype) if key.dtype.itemsize < 4 else features.to(key.dtype)
    return torch.cat((key, features.expand(-1, key.shape[1], -1, -1)), -1)


def unpack_features(columns: Tensor, heads: int) -> Tensor:
    """Invert ``pack_features``: return the extra columns as fp32 ``[B, heads, N, F]``."""
    columns = columns[:, :heads]
    return columns.contiguous().view(torch.float32) if columns.dtype.itemsize < 4 else columns.float()
