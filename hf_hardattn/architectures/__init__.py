"""Architectures: where the sites of a model are, and the Hard classes that serve them. One file each; the file name is its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import registry
from ..layers import HardLayers
from ..selector import Selector


@dataclass
class Tower:
    """A stack of layers with its sites.

    Attributes:
        root: module below which ``classes`` are swapped. layers: its list of layers.
        hard_layers: class the list takes. classes: stock class to Hard class.
        kinds: of its sites, in the order they are listed.
        attention: ``(layer, kind)`` to the module that hosts a ``self`` or ``cross`` selector.
        hidden_size, heads: of the tower. source_size: D of the tower that cross-attention reads.
        always, source_always: which row is kept always among its own rows, and among the source's (``first``, ``last`` or None).
        causal: self-attention sees the past only.
        source: name of the tower that cross-attention reads.
        restore: whether the output takes its full length again unless the configuration says otherwise.
        final_norm: LayerNorm behind the last layer; it must leave all-zero rows zero.
        embeddings: module that makes rows of images, for scorers that read pixels; None where there is none.
        channels: of these images.
    """

    root: nn.Module
    layers: Any  # nn.ModuleList; its class is swapped for hard_layers
    hard_layers: type[HardLayers]
    classes: dict[type, type]
    kinds: tuple[str, ...]
    attention: Callable[[nn.Module, str], nn.Module]
    hidden_size: int
    heads: int
    always: str | None
    source_size: int = 0
    source_always: str | None = None
    source: str | None = None
    causal: bool = False
    restore: bool = False
    final_norm: Any = None
    embeddings: nn.Module | None = None
    channels: int = 0

    def sites(self, name: str) -> Iterator[tuple[str, str, int]]:
        """Yield ``(site, kind, layer)`` of the tower called ``name``."""
        for kind in self.kinds:
            if kind == "inputs":
                yield f"{name}.inputs", kind, 0
            else:
                for layer in range(len(self.layers._modules)):
                    yield f"{name}.{kind}.{layer}", kind, layer

    def host(self, kind: str, layer: int, pixels: bool = False) -> tuple[nn.Module, str]:
        """The module that holds a site's selector, whose scorer may read ``pixels``, and the attribute's name."""
        block = self.layers[layer]
        if kind == "inputs":
            return self.embeddings if pixels and self.embeddings is not None else block, "input_selector"
        return (block, "selector") if kind == "tokens" else (self.attention(block, kind), "selector")


@dataclass
class Example:
    """A tiny model and a batch for it, for the contract tests and for users who want to try."""

    model: nn.Module
    batch: dict[str, Any] = field(default_factory=dict)


class Base:
    """An architecture.

    Class attributes:
        family: prefix of the Transformers modules it serves.
        all_towers: every tower name it knows. recommended: globs of the sites taken when the configuration names none.
    """

    family: ClassVar[str]
    all_towers: ClassVar[tuple[str, ...]]
    recommended: ClassVar[tuple[str, ...]]

    @classmethod
    def towers(cls, model: nn.Module) -> dict[str, Tower]:
        """The towers of ``model``, empty when it is none of this architecture's models."""
        raise NotImplementedError

    @classmethod
    def labels(cls, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """Labels in line with the logits, int64 ``[B, T]`` (T = 1 for one label an example), -100 where there is none."""
        labels: Tensor | None = inputs.get("labels")
        if labels is None or labels.is_floating_point():
            return None
        return labels.view(-1, 1) if labels.dim() == 1 else labels

    @classmethod
    def target_table(cls, model: nn.Module) -> Tensor | None:
        """A state for each label, ``[C, D]``: what an inference network reads of the answer; None when the head has none."""
        return None

    @classmethod
    def token_loss(cls, model: nn.Module, inputs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor] | None:
        """Task loss of each label, fp32 ``[B, T]``, and which labels count, bool ``[B, T]``; None when the output does not tell."""
        labels, logits = cls.labels(model, inputs), output.get("logits")
        if labels is None or logits is None:
            return None
        labels = labels.to(logits.device)
        rows = logits.float().view(labels.shape[0], labels.shape[1], -1).transpose(1, 2)
        return nn.functional.cross_entropy(rows, labels, ignore_index=-100, reduction="none"), labels != -100

    @classmethod
    def example_loss(cls, model: nn.Module, inputs: dict[str, Any], output: Any) -> Tensor | None:
        """Task loss of each example, the mean over its labels, ``[B]``; None when the output does not tell (the batch's loss
        then serves all)."""
        losses = cls.token_loss(model, inputs, output)
        return None if losses is None else losses[0].sum(-1) / losses[1].sum(-1).clamp(min=1)

    @classmethod
    def loss_items(cls, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """Items of this batch, ``[]``, where the model divides their summed loss by the Trainer's ``num_items_in_batch``; None
        where its loss is a mean whatever the Trainer asks for."""
        return None

    @classmethod
    def other_reader(cls, model: nn.Module, batch: dict[str, Any]) -> str | None:
        """What else in the model reads the raw inputs past its ``inputs`` sites, in words; None when nothing does."""
        return None

    @classmethod
    def replace_inputs(
        cls, model: nn.Module, batch: dict[str, Any], dropped: dict[str, Tensor], how: str, seed: int
    ) -> dict[str, Any]:
        """The batch with every dropped token or patch replaced.

        Args:
            dropped: tower to bool ``[B, N]``. how: ``noise`` | ``zero`` | ``swap`` (with another position's).
        """
        raise NotImplementedError

    @classmethod
    def heads(cls) -> dict[str, Callable[..., Example]]:
        """Head class name to a builder of its tiny example: odd, distinct sizes, no downloads."""
        raise NotImplementedError


def slots_after(selectors: list[Selector], alive: Tensor) -> int:
    """Bound of the rows that survive the sites of a tower one after the other; ``alive``: bool ``[B, N]``, those that did. It is read where
    only scores knew how many (the selectors have waited for the device then, too)."""
    slots = alive.shape[1]
    for selector in selectors:
        slots = selector.survivors(slots)
    if any(selector.enabled and selector.data_dependent for selector in selectors):
        slots = min(slots, max(1, int(alive.sum(-1).max())))
    return slots


def architecture_of(model: nn.Module) -> type[Base] | None:
    """The architecture that knows ``model``, or None."""
    for name in registry.names("architectures"):
        architecture = registry.load("architectures", name)
        if architecture.towers(model):
            return architecture
    return None
