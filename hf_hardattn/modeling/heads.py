"""Functions that read a model's head and inputs; families replace single functions if their heads differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..functional.patches import replace_patches

if TYPE_CHECKING:
    from .family import Tower


REGRESSION = "regression"  # problem_type of a head that predicts numbers and has no classes


def extends(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether the model's class or one of its bases has one of these names; a user's subclass of a head counts as that head."""
    return not {cls.__name__ for cls in type(model).__mro__}.isdisjoint(names)


def labels(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Return labels aligned with the logits, int64 ``[B, T]``; one class per example is one label."""
    found: Tensor | None = inputs.get("labels")
    if found is None or found.is_floating_point():
        return None
    return found.view(-1, 1) if found.dim() == 1 else found


def class_scores(config: Any, logits: Tensor) -> Tensor:
    """Return the score of each class as Transformers' pipelines compute it, fp32 ``[B, C]``.

    The scores are a softmax; for several labels per example or a single class, each is a sigmoid; for a regression, they are the numbers
    that the head predicts.
    """
    task, logits = getattr(config, "problem_type", None), logits.float()
    if task == REGRESSION:
        return logits
    return logits.sigmoid() if task == "multi_label_classification" or logits.shape[-1] == 1 else logits.softmax(-1)


def target_table(model: Any) -> Tensor | None:
    """Return the classifier's weight, a state for each class; None if it scores something else, as the answers of a multiple choice."""
    weight: Tensor | None = getattr(getattr(model, "classifier", None), "weight", None)
    return None if weight is None or len(weight) != model.config.num_labels else weight


def token_loss(model: Any, inputs: dict[str, Any], output: Any, known: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the cross-entropy of each label, or the error of each target if the labels are floating-point numbers.

    The error is squared or binary, as ``problem_type`` says, which heads set in their first call.
    """
    given, logits = inputs.get("labels"), output.get("logits")
    if given is None or logits is None:
        return None
    if given.is_floating_point():
        squared = (model.config.problem_type or ("regression" if logits.shape[-1] == 1 else "")) == "regression"
        loss = nn.functional.mse_loss if squared else nn.functional.binary_cross_entropy_with_logits
        losses = loss(logits.float(), given.view_as(logits).float(), reduction="none").mean(-1, keepdim=True)
        return losses, torch.ones_like(losses, dtype=torch.bool)
    if known is None:
        return None
    known = known.to(logits.device)
    rows = logits.float().view(known.shape[0], known.shape[1], -1).transpose(1, 2)
    return nn.functional.cross_entropy(rows, known, ignore_index=-100, reduction="none"), known != -100


def pair_loss(
    model: nn.Module, inputs: dict[str, Any], output: Any, known: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return the mean loss of both directions, for models that compare images with texts by softmax."""
    if output.get("logits_per_text") is None:
        return token_loss(model, inputs, output, known)
    logits = output.logits_per_text.float()
    pairs = torch.arange(len(logits), device=logits.device)
    ways = [nn.functional.cross_entropy(x, pairs, reduction="none") for x in (logits, logits.t())]
    loss = (ways[0] + ways[1]).unsqueeze(-1) / 2
    return loss, torch.ones_like(loss, dtype=torch.bool)


def replace_inputs(
    model: nn.Module, tower: Tower, batch: dict[str, Any], dropped: Tensor, how: str, seed: int
) -> dict[str, Any]:
    """Return the changed inputs of one tower: pixels for towers of images, ids for towers of tokens."""
    if tower.reads_images:
        first = tower.protected.first
        # the replacement of pixels expects one row before the patches
        patches = nn.functional.pad(dropped[:, first:], (1, 0))
        size = patch_size(tower.config)
        return {"pixel_values": replace_patches(batch["pixel_values"], patches, size, how, seed)}
    ids = batch[tower.spec.inputs]
    return {tower.spec.inputs: replace_tokens(ids, dropped, ordinary_tokens(tower.config), how, seed)}


def input_rows(tower: Tower, batch: Any) -> Tensor | None:
    """Return which rows of a tower are input tokens or patches, bool ``[B, N]``; None if its rows are computed, not given."""
    if "inputs" not in tower.kinds:
        return None
    if not tower.reads_images:
        ids = batch.get(tower.spec.inputs)
        return None if ids is None else torch.ones_like(ids, dtype=torch.bool)
    pixels = batch.get("pixel_values")
    if pixels is None:
        return None
    size, first = patch_size(tower.config), tower.protected.first
    count = (pixels.shape[-2] // size[0]) * (pixels.shape[-1] // size[1])
    if pixels.dim() == 5:
        count *= pixels.shape[1]
    rows = torch.ones(len(pixels), first + count, dtype=torch.bool, device=pixels.device)
    rows[:, :first] = False
    return rows


def patch_size(config: Any) -> tuple[int, int]:
    """Return the height and width of a patch in pixels."""
    patch = config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def ordinary_tokens(config: Any) -> Tensor:
    """Return the ids of the vocabulary that the configuration does not name as special (``eos_token_id`` ...), int64 ``[V]``, ascending."""
    special: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")) and value is not None:
            special.update(value if isinstance(value, (list, tuple)) else [value])
    return torch.tensor([token for token in range(config.vocab_size) if token not in special])


def replace_tokens(ids: Tensor, dropped: Tensor, ordinary: Tensor, how: str, seed: int) -> Tensor:
    """Replace the dropped tokens, int64 ``[B, N]``, by ordinary ones: random tokens, always the same token, or their neighbours.

    A replacement is never the token that was there, and the random token is never the constant one.

    Args:
        ordinary: ids that may be put in, int64 ``[V]``, ascending, V >= 3.
    """
    ordinary = ordinary.to(ids.device)
    if how == "swap":
        return torch.where(dropped, _neighbours(ids, ordinary, seed), ids)
    if how == "zero":
        return torch.where(dropped, torch.where(ids == ordinary[0], ordinary[1], ordinary[0]), ids)
    return torch.where(dropped, _other_tokens(ids, ordinary, seed), ids)


def _other_tokens(ids: Tensor, ordinary: Tensor, seed: int) -> Tensor:
    """Return random ordinary tokens: neither the one that is there nor the one that replaces it as the constant."""
    if len(ordinary) < 3:
        raise HardAttentionError(
            f"only {len(ordinary)} tokens of the vocabulary are not special; to replace a token, there must be 3. Use a larger vocabulary."
        )
    # The constant is ordinary[0], or ordinary[1] where ordinary[0] was: of the two excluded places, one is always 0.
    excluded = torch.searchsorted(ordinary, ids.contiguous()).clamp(1, len(ordinary) - 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, len(ordinary) - 1, ids.shape, generator=generator).to(ids.device)
    return ordinary[drawn + (drawn >= excluded)].to(ids)


def _neighbours(ids: Tensor, ordinary: Tensor, seed: int) -> Tensor:
    """Return the nearest token to the left, around the end, that is ordinary and another one; a random token if a row has none."""
    found, missing = _other_tokens(ids, ordinary, seed), torch.ones_like(ids, dtype=torch.bool)
    usable = torch.isin(ids, ordinary)
    for distance in range(1, ids.shape[1]):
        near = ids.roll(distance, 1)
        fits = missing & (near != ids) & usable.roll(distance, 1)
        found, missing = torch.where(fits, near, found), missing & ~fits
    return found


# ---------------------------------------------------------------- models that generate


def next_labels(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Return the labels of a model that predicts the next token, aligned with its logits; heads that cannot generate do not shift them."""
    given: Tensor | None = inputs.get("labels")
    if given is None or not model.can_generate():
        return labels(model, inputs)
    return nn.functional.pad(given[:, 1:], (0, 1), value=-100)


def vocabulary(model: Any) -> Tensor | None:
    """Return the embeddings of the tokens that a label can be, or the weight of a classifier."""
    if model.can_generate():
        table: Tensor = model.get_input_embeddings().weight
        return table
    weight: Tensor | None = getattr(getattr(model, "score", None), "weight", None)
    return weight


# the functions that the row of a decoder replaces
NEXT_TOKEN: dict[str, Callable[..., Any]] = {
    "labels": next_labels,
    "target_table": vocabulary,
}
