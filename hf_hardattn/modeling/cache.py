"""One layer of a Transformers cache, as an attention with selection uses it, and what is remembered beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from .state import KeySubset

MEMO = "hard_attention_kept"  # attribute of a cache: site to the KeySubset that its first step chose


class CacheLayer:
    """Keys and values of one layer.

    Attributes:
        store: a Transformers ``Cache``. layer: index in it.
        filled: the keys of a cross-attention are there already.
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
            # a static cache hands out the counter that the next update moves
            self.past = past.clone() if isinstance(past, Tensor) else past

    def read(self) -> tuple[Tensor, Tensor]:
        """The cached keys and values."""
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
        """Note positions that monotonic attention has passed, bool ``[B, heads, N]``, in the last feature of the cached keys.

        Args:
            size: d, columns of the keys themselves; the features stand behind them.
        """
        layer = self.store.layers[self.layer]
        features = unpack_features(layer.keys[..., size:], heads).clone()
        features[..., -1] += passed
        if layer.keys.requires_grad:
            # autograd holds the keys of a training forward: write beside them
            layer.keys = pack_features(features, layer.keys[..., :size])
        else:
            layer.keys[..., size:] = pack_features(features, layer.keys[..., :size])[..., size:]


def resize_static_layer(store: Any, layer: int, keys: int) -> None:
    """Give a static layer of a cross-attention as many places as it will hold keys, not one for every row of the source."""
    if not store.is_compileable or layer >= len(store.layers):
        return
    slot = store.layers[layer]
    if slot.max_cache_len != keys:
        slot.max_cache_len, slot.is_initialized = keys, False  # the next update makes its tensors


def remembered(cache: Any, site: str) -> KeySubset | None:
    """The keys that ``site`` left when the cache was filled."""
    return getattr(cache, MEMO, {}).get(site)


def remember(cache: Any, site: str, keys: KeySubset) -> None:
    """Keep the choice of ``site`` beside the cached keys. Beams of one source share it, so it needs no reordering."""
    if not hasattr(cache, MEMO):
        setattr(cache, MEMO, {})
    getattr(cache, MEMO)[site] = keys


def pack_features(features: Tensor, key: Tensor) -> Tensor:
    """Scores' features, fp32 ``[B, H or 1, N, F]``, as extra columns of the keys ``[B, H, N, d]``.

    A half-precision cache stores the bits of the fp32 numbers in two columns each, so that nothing is rounded: with the cache
    and without it the same positions are kept. The columns follow every reordering and cropping of the keys.
    """
    features = features.contiguous().view(key.dtype) if key.dtype.itemsize < 4 else features.to(key.dtype)
    return torch.cat((key, features.expand(-1, key.shape[1], -1, -1)), -1)


def unpack_features(columns: Tensor, heads: int) -> Tensor:
    """Inverse of ``pack_features`` for the extra columns, fp32 ``[B, heads, N, F]``."""
    columns = columns[:, :heads]
    return columns.contiguous().view(torch.float32) if columns.dtype.itemsize < 4 else columns.float()
