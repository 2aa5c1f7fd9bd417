"""Rotary embeddings of the rows that remain after a selection: queries and keys keep the angles of their own positions.

Shapes: B batch, H heads, N rows, K kept rows, d head size. Tables are the family's ``(cos, sin)``, in the form that its layers receive:
``[N, d]``, ``[B or 1, N, d]``, ``[B or 1, 1, N, d]`` or ``[3, B, N, d]`` (one for each axis of a video).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..functional.varlen import Packing

Tables = tuple[Tensor, Tensor]  # cos and sin


def rotate(module: Any, function: str, states: Tensor, tables: Tables) -> Tensor:
    """Rotate queries or keys ``[B, H, N, d]`` by their positions, with the family's own function.

    Args:
        module: the attention module. function: name of the function in the family's file.
    """
    turned, _ = family_function(module, function)(states, states[:, :1], *tables)
    return turned


def family_function(module: Any, name: str) -> Callable[..., Any]:
    """Return a function from the file that defines a module's class or one of its bases, since a user's subclass is in another file.

    Raises:
        NotImplementedError: if no such file has it.
    """
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), name, None)
        if function is not None:
            return function
    raise NotImplementedError(f"{type(module).__name__} has no {name}")


def tables_at(tables: Tables, indices: Tensor, rows: int) -> Tables:
    """Return the tables of some rows.

    Args:
        indices: int64 ``[B, K]``, among ``rows`` rows. Rows before those that a table ``[N, d]`` covers are not rotated.

    Returns:
        ``[B, 1, K, d]`` for tables without a batch, which broadcast over heads; otherwise of the same form with K rows.
    """
    cos, sin = tables
    missing = rows - cos.shape[-2]
    if missing:
        cos, sin = (nn.functional.pad(t, (0, 0, missing, 0), value=v) for t, v in ((cos, 1.0), (sin, 0.0)))
    return _at(cos, indices), _at(sin, indices)


def _at(table: Tensor, indices: Tensor) -> Tensor:
    batch, size = len(indices), table.shape[-1]
    if table.dim() == 2:
        return table[indices].unsqueeze(1)
    if table.dim() == 3:
        return table.expand(batch, -1, -1).gather(1, indices.unsqueeze(-1).expand(-1, -1, size))
    if table.shape[1] == 1 and table.shape[0] in (1, batch):
        return table.expand(batch, -1, -1, -1).gather(2, indices[:, None, :, None].expand(-1, 1, -1, size))
    axes = indices[None, :, :, None].expand(len(table), -1, -1, size)
    return table.expand(-1, batch, -1, -1).gather(2, axes)


def packed_tables(tables: Tables, packing: Packing) -> Tables:
    """Return the tables of packed rows: ``[B, K, d]`` to ``[1, T, d]``, ``[B, 1, K, d]`` to ``[1, 1, T, d]``."""
    cos, sin = (_packed(table, packing) for table in tables)
    return cos, sin


def _packed(table: Tensor, packing: Packing) -> Tensor:
    batch = len(packing.order)
    if table.dim() == 2:
        table = table[None, None]
    if table.dim() == 3:
        return packing.to_packed(table.expand(batch, -1, -1))
    if table.shape[1] == 1 and table.shape[0] in (1, batch):
        return packing.to_packed(table.expand(batch, -1, -1, -1)[:, 0]).unsqueeze(1)
    return (
        packing.to_packed(table.expand(-1, batch, -1, -1).permute(1, 2, 0, 3).flatten(2))
        .unflatten(-1, (len(table), -1))
        .permute(2, 0, 1, 3)
    )
