"""What the library reads of a model's head and inputs; families replace single functions where theirs differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional.patches import replace_patches

if TYPE_CHECKING:
    from .family import Tower


def extends(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether the model's class, or one that it extends, has one of these names: a user's subclass of a head is that head."""
    return not {cls.__name__ for cls in type(model).__mro__}.isdisjoint(names)


def labels(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Labels in line with the logits, int64 ``[B, T]``; a class of each example is one label."""
    found: Tensor | None = inputs.get("labels")
    if found is None or found.is_floating_point():
        return None
    return found.view(-1, 1) if found.dim() == 1 else found


def target_table(model: nn.Module) -> Tensor | None:
    """The classifier's weight, a state for each class."""
    weight: Tensor | None = getattr(getattr(model, "classifier", None), "weight", None)
    return weight


def token_loss(
    model: nn.Module, inputs: dict[str, Any], output: Any, known: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Cross-entropy of each label; squared or binary error where the labels are numbers."""
    given, logits = inputs.get("labels"), output.get("logits")
    if given is None or logits is None:
        return None
    if given.is_floating_point():
        loss = nn.functional.mse_loss if logits.shape[-1] == 1 else nn.functional.binary_cross_entropy_with_logits
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
    """For models that compare images with texts by softmax, the mean loss of both directions."""
    if output.get("logits_per_text") is None:
        return token_loss(model, inputs, output, known)
    logits = output.logits_per_text.float()
    pairs = torch.arange(len(logits), device=logits.device)
    ways = [nn.functional.cross_entropy(x, pairs, reduction="none") for x in (logits, logits.t())]
    loss = (ways[0] + ways[1]).unsqueeze(-1) / 2
    return loss, torch.ones_like(loss, dtype=torch.bool)


def loss_items(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """None: most heads return a mean."""
    return None


def classified_items(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """The number of classes given, for image classifiers, whose loss function follows ``num_items_in_batch``."""
    given = inputs.get("labels")
    if not type(model).__name__.endswith("ForImageClassification") or given is None or given.is_floating_point():
        return None
    return (given != -100).sum()


def replace_inputs(
    model: nn.Module, tower: Tower, batch: dict[str, Any], dropped: Tensor, how: str, seed: int
) -> dict[str, Any]:
    """The changed inputs of one tower: pixels for towers of images, ids for towers of tokens."""
    if tower.reads_images:
        first = tower.protected.first
        # one row stands in front of the patches wherever pixels are replaced
        patches = nn.functional.pad(dropped[:, first:], (1, 0))
        size = patch_size(tower.config)
        return {"pixel_values": replace_patches(batch["pixel_values"], patches, size, how, seed)}
    ids = batch[tower.spec.inputs]
    return {tower.spec.inputs: replace_tokens(ids, dropped, tower.config, how, seed)}


def input_rows(tower: Tower, batch: Any) -> Tensor | None:
    """Which rows of a tower are input tokens or patches, bool ``[B, N]``; None when its rows are made, not given."""
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
    """Height and width of a patch, in pixels."""
    patch = config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def replace_tokens(ids: Tensor, dropped: Tensor, config: Any, how: str, seed: int) -> Tensor:
    """Replace the dropped tokens ``[B, N]`` by random ones, the first ordinary token, or their neighbour."""
    special = (config.pad_token_id, config.eos_token_id, getattr(config, "bos_token_id", None))
    lowest = max(token for token in (0, *special) if isinstance(token, int) and token < config.vocab_size - 1) + 1
    generator = torch.Generator().manual_seed(seed)
    if how == "noise":
        other = torch.randint(lowest, config.vocab_size, ids.shape, generator=generator).to(ids)
    elif how == "zero":
        other = torch.full_like(ids, lowest)
    else:
        other = ids.roll(1, 1).clamp(min=lowest)
    return torch.where(dropped, other, ids)


# ---------------------------------------------------------------- models that write


def next_labels(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Labels of a model that predicts the next token, in line with its logits; a class of each example as of any model."""
    given: Tensor | None = inputs.get("labels")
    if given is None or given.dim() == 1:
        return labels(model, inputs)
    return nn.functional.pad(given[:, 1:], (0, 1), value=-100)


def vocabulary(model: Any) -> Tensor | None:
    """The embeddings of the tokens that a label can be, or the weight of a classifier."""
    if model.can_generate():
        table: Tensor = model.get_input_embeddings().weight
        return table
    weight: Tensor | None = getattr(getattr(model, "score", None), "weight", None)
    return weight


def predicted_items(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """The number of tokens to predict, by which a causal language model divides the loss that the Trainer accumulates."""
    known = next_labels(model, inputs) if model.can_generate() else None
    return None if known is None else (known != -100).sum()


# what a row of a decoder replaces
NEXT_TOKEN: dict[str, Callable[..., Any]] = {
    "labels": next_labels,
    "target_table": vocabulary,
    "loss_items": predicted_items,
}
