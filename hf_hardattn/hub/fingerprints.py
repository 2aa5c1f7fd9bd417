"""Fingerprints of a base model, so that selectors are only loaded on the weights that they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..recording import selectors

# Weights loaded in a narrower dtype than that of the file cannot be told from others that round to the same numbers.
WIDE = (torch.float32, torch.float64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return the sha256 over names, shapes and values of the tensors outside the selectors.

    Args:
        dtype: dtype that floating-point tensors are rounded to first; that of the model by default.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(model)):
        values = tensor.to(dtype or _dtype(model)) if tensor.is_floating_point() else tensor
        digest.update(f"{name}{list(tensor.shape)}".encode() + _bytes(values))
    return digest.hexdigest()


def fingerprint_of_all(model: nn.Module) -> str:
    """Return the sha256 over names, shapes and values of all tensors, selectors included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


def fingerprint_of_format_1(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return the fingerprint in files of format 1: the sha256 over the set of tensors, without their names.

    Args:
        dtype: dtype that floating-point tensors are rounded to first; by default each keeps its own.
    """
    digests = {
        hashlib.sha256(_bytes(tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor)).digest()
        for _, tensor in _base_tensors(model)
    }
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def is_base_of(
    model: Any, wanted: str, saved_format: int, saved_dtype: str, reload: Callable[[torch.dtype], Any]
) -> bool:
    """Whether ``model``, the base model with selectors, has the weights that the fingerprint ``wanted`` was computed from.

    The selectors may have been saved with the base model in another dtype than it has now, so each dtype is tried.

    Args:
        saved_format, saved_dtype: format and dtype in the file that holds ``wanted``. reload: loads the base model in a given dtype.
    """
    take = fingerprint if saved_format > 1 else fingerprint_of_format_1
    whole = not any(tensor.is_meta for _, tensor in _base_tensors(model))
    if whole and take(model) == wanted:
        return True
    if _dtype(model) not in WIDE or not whole:  # narrowed, quantised, or not in memory
        model = reload(torch.float32)
    if take(model) == wanted or any(take(model, dtype) == wanted for dtype in DTYPES):
        return True
    # format 1 hashed each tensor in its own dtype, and a half-precision T5 keeps some tensors in float32
    dtype = next((dtype for dtype in DTYPES if str(dtype) == saved_dtype and dtype not in WIDE), None)
    return saved_format == 1 and dtype is not None and take(reload(dtype)) == wanted


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of everything outside the selectors, without the prefix of compiled modules."""
    inside = {id(tensor) for part in selectors(model).values() for tensor in part.state_dict(keep_vars=True).values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in inside:
            yield name.replace("_orig_mod.", ""), tensor


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter outside the selectors."""
    found = (tensor.dtype for _, tensor in _base_tensors(model) if tensor.is_floating_point())
    return next(found, torch.float32)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
