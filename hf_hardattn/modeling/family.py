"""A family of models, which finds its towers in a model by the names in its ``ModelSpec``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from . import heads
from .candidates import Protected
from .spec import AttentionSpec, ModelSpec, TowerSpec

FAMILY = "hard_attention_family"  # attribute of a hard model: the name of its family


class Tower:
    """A tower of one model.

    Attributes:
        name: first part of its site names: the name in its row, followed by a number if a model has several such towers.
        spec: its row in ``models/``. module: the module itself.
    """

    def __init__(self, name: str, spec: TowerSpec, module: Any):
        self.name, self.spec, self.module = name, spec, module

    @property
    def layers(self) -> nn.ModuleList:
        """The original list of layers."""
        layers: Any = self.module.get_submodule(self.spec.layers)
        return layers

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def hidden_size(self) -> int:
        """D, the width of its rows."""
        return self.config.hidden_size

    @property
    def heads(self) -> int:
        """H, the number of its attention heads."""
        return getattr(self.config, self.spec.heads)

    @property
    def source_size(self) -> int:
        """D, the width of the rows that its cross-attention reads."""
        return getattr(self.config, self.spec.source_size)

    @property
    def causal(self) -> bool:
        return self.spec.causal

    @property
    def source(self) -> str | None:
        """The name of the tower that its cross-attention reads."""
        return self.spec.reads

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its sites; a tower without cross-attention layers has no ``cross`` sites."""
        has_cross = any(self.crosses(layer) for layer in self.layers)
        return tuple(kind for kind in self.spec.kinds if kind != "cross" or has_cross)

    def crosses(self, layer: nn.Module) -> bool:
        """Return whether a layer has a cross-attention; a tower may have it in some of its layers only."""
        return self.spec.cross is not None and _has_submodule(layer, self.spec.cross)

    @property
    def protected(self) -> Protected:
        """The rows that are always kept."""
        first = self.spec.protect_first
        if not isinstance(first, int):
            first = sum(part if isinstance(part, int) else getattr(self.config, part) for part in first)
        return Protected(first, self.spec.protect_last)

    @property
    def reads_images(self) -> bool:
        """Whether its rows are the patches of an image in a grid, after the protected rows."""
        return self.spec.inputs == "pixel_values" and not self.spec.patchified

    @property
    def has_patches(self) -> bool:
        """Whether a scorer of pixels can choose the patches that its embedding module embeds."""
        patches = self.spec.patches
        return patches is not None and type(self.module.get_submodule(patches.module)).__name__ == patches.embedding

    def sites(self) -> Iterator[tuple[str, str, int]]:
        """Yield ``(site, kind, layer)``."""
        for kind in self.kinds:
            if kind != "inputs":
                for index, layer in enumerate(self.layers):
                    if kind != "cross" or self.crosses(layer):
                        yield f"{self.name}.{kind}.{index}", kind, index
            elif len(self.layers):
                yield f"{self.name}.inputs", kind, 0

    def hosts(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield every site that has a selector, with the module that holds it and the name of its attribute."""
        for site, kind, layer in self.sites():
            for pixels in (False, True) if kind == "inputs" else (False,):
                host, name = self.host(kind, layer, pixels)
                if host._modules.get(name) is not None:
                    yield site, host, name

    def window(self, index: int) -> int | None:
        """Return the width of a layer's sliding window; None if it has none."""
        if not self.spec.prompt:
            return None
        if self.spec.window is not None:
            return getattr(self.config, self.spec.window)
        return getattr(self.attention(self.layers[index], "self"), "sliding_window", None)

    def attention(self, layer: nn.Module, kind: str) -> Any:
        """Return the attention module of a layer, for ``self`` or ``cross``."""
        return layer.get_submodule(str(self.spec.attention if kind == "self" else self.spec.cross))

    def attentions(self, layer: nn.Module) -> list[Any]:
        """Return the attention modules that a layer has."""
        own = [self.attention(layer, "self")] if self.spec.attention else []
        return [*own, self.attention(layer, "cross")] if self.crosses(layer) else own

    def attention_spec(self, kind: str) -> AttentionSpec:
        """Return the names inside the attention module, for ``self`` or ``cross``."""
        cross = self.spec.cross_spec if kind == "cross" else None
        return self.spec.attention_spec if cross is None else cross

    def host(self, kind: str, layer: int, pixels: bool = False) -> tuple[nn.Module, str]:
        """Return the module that holds a site's selector, and the name of its attribute; ``pixels``: the scorer reads pixels."""
        block = self.layers[layer]
        if kind == "inputs":
            if pixels and self.spec.patches is not None:
                return self.module.get_submodule(self.spec.patches.module), "input_selector"
            return block, "input_selector"
        return (block, "selector") if kind == "tokens" else (self.attention(block, kind), "selector")


def _fits(spec: TowerSpec, module: Any) -> bool:
    """Return whether a module of the right class is this tower; an encoder class used as a decoder, for example, is not."""
    if spec.where:
        return all(getattr(module, name, None) == value for name, value in spec.where.items())
    return spec.causal or not getattr(module.config, "is_decoder", False)


def _has_submodule(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


class Family:
    """A family of models, as described by a row of ``models/``.

    Args:
        spec: the row.
    """

    def __init__(self, spec: ModelSpec):
        self.spec = spec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def all_towers(self) -> tuple[str, ...]:
        """The names of all towers that its models may have."""
        return tuple(tower.name for tower in self.spec.towers)

    def recommended(self, towers: Mapping[str, Tower]) -> tuple[str, ...]:
        """Return the glob of the sites used if the configuration names none; empty if the model lacks the recommended towers."""
        for pattern in self.spec.recommended:
            name, kind, *layer = pattern.split(".")
            if name in towers and kind in towers[name].kinds:
                count = len(towers[name].layers)
                depth = [str(count * int(part[:-1]) // 100) if part.endswith("%") else part for part in layer]
                return (".".join([name, kind, *depth]),)
        return ()

    def owns(self, model: nn.Module) -> bool:
        """Return whether the model's class, or one that it extends, is defined by this family."""
        return any(cls.__module__.startswith(self.spec.family) for cls in type(model).__mro__)

    def towers(self, model: nn.Module) -> dict[str, Tower]:
        """Return the towers in ``model`` by name; empty if it has none of this family."""
        if self.spec.find_towers is not None:
            found = self.spec.find_towers(model)
            return {name: Tower(name, spec, module) for name, (spec, module) in found.items()}
        towers: dict[str, Tower] = {}
        for spec, module in self._of_its_classes(model):
            if _fits(spec, module):
                same = sum(tower.spec is spec for tower in towers.values())
                name = spec.name if not same else f"{spec.name}{same + 1}"
                towers[name] = Tower(name, spec, module)
        if heads.extends(model, self.spec.counting_heads):
            for tower in towers.values():
                tower.spec = replace(tower.spec, only=("self",))
        if heads.extends(model, self.spec.reading_heads):
            for tower in towers.values():
                tower.spec = replace(tower.spec, continues=False)
        return towers

    def _of_its_classes(self, model: nn.Module) -> Iterator[tuple[TowerSpec, nn.Module]]:
        for module in model.modules():
            names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith(self.spec.family)}
            for spec in self.spec.towers if names else ():
                if spec.module in names:
                    yield spec, module

    def knows_as_encoder(self, model: nn.Module) -> bool:
        """Return whether a model without towers of this family has a module of such a class, configured as a decoder."""
        return self.spec.find_towers is None and any(True for _ in self._of_its_classes(model))

    def prepare(self, model: nn.Module) -> None:
        """Prepare whatever else a hard model of the family needs."""
        if "prepare" in self.spec.functions:
            self.spec.functions["prepare"](model)

    def release(self, model: nn.Module) -> None:
        """Undo ``prepare``."""
        if "release" in self.spec.functions:
            self.spec.functions["release"](model)

    # ---------------------------------------------------------------- heads: what a model predicts

    def _call(self, name: str, *args: Any) -> Any:
        function = self.spec.functions.get(name) or getattr(heads, name)
        return function(*args)

    def labels(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """Return labels aligned with the logits, int64 ``[B, T]`` (T = 1 for one label per example), -100 where there is none."""
        labels: Tensor | None = self._call("labels", model, inputs)
        return labels

    def target_table(self, model: nn.Module) -> Tensor | None:
        """Return a state for each label, ``[C, D]``, from which an inference network reads the answer; None if the head has none."""
        table: Tensor | None = self._call("target_table", model)
        return table

    def token_loss(self, model: nn.Module, inputs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor] | None:
        """Return the task loss of each label, fp32 ``[B, T]``, and which of them count, bool ``[B, T]``; None if the output has no loss."""
        losses: tuple[Tensor, Tensor] | None = self._call(
            "token_loss", model, inputs, output, self.labels(model, inputs)
        )
        return losses

    def example_loss(self, model: nn.Module, inputs: dict[str, Any], output: Any) -> Tensor | None:
        """Return the task loss of each example, the mean over its labels, ``[B]``.

        None if the output has no such loss; all examples then share the loss of the batch.
        """
        losses = self.token_loss(model, inputs, output)
        return None if losses is None else losses[0].sum(-1) / losses[1].sum(-1).clamp(min=1)

    def replace_inputs(
        self, model: nn.Module, batch: dict[str, Any], dropped: dict[str, Tensor], how: str, seed: int
    ) -> dict[str, Any]:
        """Return the batch with every dropped token or patch replaced.

        Args:
            dropped: dict from tower to bool ``[B, N]``. how: ``noise`` | ``zero`` | ``swap`` (with another position).
        """
        batch = dict(batch)
        for name, rows in dropped.items():
            tower = self.towers(model)[name]
            batch |= self._call("replace_inputs", model, tower, batch, rows, how, seed)
        return batch

    def input_rows(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the towers whose rows are inputs of the model, with bool ``[B, N]``: which rows are an input token or patch."""
        found = {}
        for name, tower in self.towers(model).items():
            if self.spec.candidates and tower.spec.prompt:
                continue  # the rows of an image come from another tower
            rows = self._call("input_rows", tower, batch)
            if rows is not None:
                found[name] = rows
        return found
