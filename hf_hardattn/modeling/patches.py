"""Scorers of pixels: they score a coarse version of the whole image, and only the chosen patches are embedded."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Arguments, parameter_names
from .context import ForwardContext
from .offloading import weights_in_place
from .plan import TowerPlan
from .projection import is_bare
from .rows import candidates_among
from .selector import running
from .spec import PatchSpec
from .state import TowerState

PLAN = "hard_attention_patches"


@dataclass
class PatchChoice:
    """The chosen patches, passed from the tower's hook to the embedding module in one of its arguments.

    Attributes:
        given: what the caller passed for that argument.
        patches: int64 ``[B, K]``, ascending, in row-major order of the image.
        grid: number of patches down and across these images; None if the table of positions needs no interpolation.
    """

    given: Any
    patches: Tensor
    grid: tuple[int, int] | None


def choose_patches(
    tower: Any, plan: TowerPlan, context: ForwardContext, state: TowerState, arguments: Arguments
) -> None:
    """Choose patches before any is embedded, and pass the choice to the embedding module."""
    spec: Any = plan.patches
    embeddings, pixels = tower.get_submodule(spec.module), arguments.get("pixel_values")
    selector = running(embeddings.input_selector)
    given, size = arguments.get(spec.carrier), _patch_size(tower.config)
    interpolates = spec.always_interpolates or bool(given)
    if pixels is None or not (interpolates or _fits(tower.config, spec, pixels, size)):
        return  # Transformers raises the error
    settings = context.settings(selector)
    if settings.soft or (selector.keeps_all and not settings.drawing and not settings.recorders):
        return
    grid = pixels.shape[-2] // size[0], pixels.shape[-1] // size[1]
    prefix = plan.protected.first
    rows = prefix + grid[0] * grid[1]
    state.begin(rows, state.mask)
    coarse, means = _coarse_image(pixels, grid, size, selector.scorer.cells)
    inputs = selector.training_inputs(nn.functional.pad(means, (0, 0, prefix, 0)), None, context, settings)
    features = selector.keys(coarse, settings)
    states = pixels.new_empty((len(pixels), rows, 1))
    candidates = candidates_among(plan.protected, state.valid, states, None)
    selection = selector(features, candidates, settings, inputs=inputs)
    context.add(selection, settings)
    indices = state.apply(selection, len(pixels), rows)
    if indices is None:
        return
    if state.mask is not None:
        state.mask = state.mask.gather(1, indices)
        arguments.set("attention_mask", state.mask)
    patches = indices[:, prefix:] - prefix
    arguments.set(spec.carrier, PatchChoice(given, patches, grid if interpolates else None))


def _patch_size(config: Any) -> tuple[int, int]:
    patch = config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def _fits(config: Any, spec: PatchSpec, pixels: Tensor, size: tuple[int, int]) -> bool:
    """Return whether the positions of these images need no interpolation."""
    image = config.image_size
    image = (image, image) if isinstance(image, int) else tuple(image)
    if spec.fixed_size:
        return tuple(pixels.shape[-2:]) == image
    held = (image[0] // size[0]) * (image[1] // size[1])
    return (pixels.shape[-2] // size[0]) * (pixels.shape[-1] // size[1]) <= held


def _coarse_image(pixels: Tensor, grid: tuple[int, int], size: tuple[int, int], cells: int) -> tuple[Tensor, Tensor]:
    """Return the image averaged to ``cells`` x ``cells`` numbers per patch, and the mean of each patch ``[B, patches, C]``."""
    whole = pixels[..., : grid[0] * size[0], : grid[1] * size[1]]
    coarse = nn.functional.adaptive_avg_pool2d(whole, (grid[0] * cells, grid[1] * cells))
    means = nn.functional.avg_pool2d(coarse, cells).flatten(2).transpose(1, 2)
    return coarse, means


def install(embeddings: nn.Module, spec: PatchSpec) -> None:
    """Make an embedding module embed only the chosen patches."""
    embeddings.__dict__[PLAN] = (spec, parameter_names(embeddings), embeddings.__dict__.get("forward"))
    embeddings.__dict__["forward"] = functools.partial(embed_chosen, embeddings)


def uninstall(embeddings: Any) -> None:
    """Restore the forward of an embedding module."""
    plan = embeddings.__dict__.pop(PLAN, None)
    if plan is None:
        return
    if plan[2] is None:
        del embeddings.__dict__["forward"]
    else:
        embeddings.__dict__["forward"] = plan[2]


def embed_chosen(embeddings: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of an embedding module: the prefix rows and the chosen patches, ``[B, P + K, D]``, or all patches if there is no choice."""
    spec, names, stock = embeddings.__dict__[PLAN]
    arguments = Arguments(names, args, kwargs)
    choice = arguments.get(spec.carrier)
    if not isinstance(choice, PatchChoice):
        found: Tensor = (
            type(embeddings).forward(embeddings, *args, **kwargs) if stock is None else stock(*args, **kwargs)
        )
        return found
    projection: Any = embeddings.get_submodule(spec.projection)
    pixels = arguments.get("pixel_values")
    rows = embed_patches(projection, pixels.to(projection.weight.dtype), choice.patches, _kernel(projection))
    hidden = choice.given if spec.carrier == "bool_masked_pos" else arguments.get("bool_masked_pos")
    if hidden is not None:
        token = embeddings.mask_token
        rows = torch.where(hidden.gather(1, choice.patches).unsqueeze(-1), token.view(1, 1, -1), rows)
    table = _position_table(embeddings, spec)
    rows = rows + embed_positions(table, choice.patches, choice.grid, prefix=int(spec.cls is not None))
    rows = torch.cat((*_prefix_rows(embeddings, spec, table, len(rows)), rows), 1)
    dropout = getattr(embeddings, "dropout", None)
    return rows if dropout is None else dropout(rows)


def _prefix_rows(embeddings: Any, spec: PatchSpec, table: Tensor, batch: int) -> list[Tensor]:
    rows = []
    if spec.cls is not None:
        cls = getattr(embeddings, spec.cls).view(1, 1, -1) + table[:, :1]
        rows.append(cls.expand(batch, -1, -1))
    if spec.registers is not None:
        rows.append(getattr(embeddings, spec.registers).expand(batch, -1, -1))
    return rows


def _position_table(embeddings: Any, spec: PatchSpec) -> Tensor:
    """Return the embeddings of all positions, ``[1, prefix + P, D]``."""
    table = getattr(embeddings, spec.positions)
    # a module is called, because an adapter or a hook may surround it
    return table(embeddings.position_ids) if isinstance(table, nn.Module) else table


def _kernel(projection: Any) -> tuple[int, int]:
    size: tuple[int, int] = projection.kernel_size
    return size


def embed_patches(projection: Any, pixels: Tensor, patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply the convolution ``projection``, whose stride equals its kernel size, at some patches, without computing the others.

    Args:
        pixels: ``[B, C, height, width]``. patches: int64 ``[B, K]``, in row-major order. size: size of a patch.

    Returns:
        ``[B, K, D]``.
    """
    tiles = pixels.unfold(2, size[0], size[0]).unfold(3, size[1], size[1]).permute(0, 2, 3, 1, 4, 5)  # a view
    across = tiles.shape[2]
    batch = torch.arange(len(pixels), device=pixels.device).unsqueeze(-1)
    found = tiles[batch, patches // across, patches % across]  # [B, K, C, h, w]
    if is_bare(projection, nn.Conv2d):
        with weights_in_place(projection):
            return nn.functional.linear(found.flatten(2), projection.weight.flatten(1), projection.bias)
    # an adapter or a hook surrounds the convolution: call it on each patch as on an image, or its part would be lost
    rows: Any = projection(found.flatten(0, 1))
    return rows.flatten(1).unflatten(0, patches.shape)


def embed_positions(table: Tensor, patches: Tensor, grid: tuple[int, int] | None, prefix: int = 1) -> Tensor:
    """Return the position embeddings of some patches, ``[B, K, D]``.

    Bicubic interpolation is separable: the weights of a position are those of its row times those of its column. Interpolating unit
    vectors gives PyTorch's own weights. The result equals Transformers' ``interpolate_pos_encoding`` up to the order of its sums.

    Args:
        table: learned embeddings ``[1, prefix + P, D]``, the prefix first, then a square of patches.
        patches: int64 ``[B, K]``. grid: number of patches down and across these images; None for the table's own grid, without
            interpolation.
    """
    learned = table[0, prefix:]
    side = math.isqrt(len(learned))
    if grid is None or grid == (side, side):
        return learned[patches]
    unit = torch.eye(side, device=table.device)[None, :, :, None]
    down, across = (
        nn.functional.interpolate(unit, size=(n, 1), mode="bicubic", align_corners=False)[0, :, :, 0].t() for n in grid
    )
    weights = down[patches // grid[1]].unsqueeze(-1) * across[patches % grid[1]].unsqueeze(-2)  # [B, K, side, side]
    return (weights.flatten(-2) @ learned.float()).to(table.dtype)
