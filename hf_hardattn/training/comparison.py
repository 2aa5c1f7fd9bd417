"""Definition of a comparison: a task, its recipe, and named variants, each a way to select."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from .. import registry
from ..config import HardAttentionConfig
from ..errors import HardAttentionError, unknown
from . import tasks
from .parsing import shipped

REDUCE = "reduce"  # key of a variant: the ratio to which the inputs of a soft model are reduced
# Controls that a learned selection has to beat. A value of None is the soft model.
CONTROLS: dict[str, dict[str, Any] | None] = {
    "soft": None,
    "random": {"scorer": "random", "estimator": "straight_through"},
    "first": {"scorer": "first", "estimator": "straight_through"},
    "static": {"scorer": "static", "estimator": "simple", "estimator_options": {"sample": False}},
    "cls_attention": {"scorer": "cls_attention", "estimator": "straight_through"},
    "downsampled": {REDUCE: None},  # the soft model on inputs reduced to the number of rows that the budget keeps
}
ALWAYS = ("soft", "random", "static", "downsampled")  # part of every comparison unless its file says `controls: false`


@dataclass(frozen=True)
class Comparison:
    """A comparison: the content of a file in ``scripts/configs/compare/``.

    Attributes:
        task: name of the task. task_options: its keyword options.
        recipe: changes to the task's recipe.
        budget: ratio to keep in variants that do not set one; None for that of the task.
        variants: maps a name to the fields of a ``HardAttentionConfig`` that differ from the task's recommendation. A name without
            fields stands for the control or the estimator of that name. A float ``budget`` is annealed.
        controls: whether to add the controls of ``ALWAYS`` that are not among the variants.
        trunk_seed: seed of the one soft base checkpoint that all seeds start from; None trains one for each seed.
    """

    task: str
    variants: dict[str, dict[str, Any] | None]
    task_options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    budget: float | None = None
    trunk_seed: int | None = None
    controls: bool = True

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read a YAML file.

        Raises:
            HardAttentionError: the file, or one of its keys, its task or a variant does not exist.
        """
        path = shipped(path)
        if not path.is_file():
            raise HardAttentionError(
                f"--config {str(path)!r} is not a file; use one like scripts/configs/compare/*.yaml."
            )
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(data, dict):
            raise HardAttentionError(
                f"{path} holds a {type(data).__name__}; a comparison must be a mapping with a task and variants."
            )
        for name in data:
            if name not in cls.__dataclass_fields__:
                raise unknown("key", name, cls.__dataclass_fields__, str(path))
        for name in ("task", "variants"):
            if not data.get(name):
                raise HardAttentionError(f"{path} has no {name}; a comparison needs a task and variants.")
        for name, kind in (("variants", dict), ("task_options", dict), ("recipe", dict)):
            if not isinstance(data.get(name, {}), kind):
                raise HardAttentionError(
                    f"{name} of {path} is a {type(data[name]).__name__}; it must be a mapping with one 'name: settings' per line. A control "
                    "or an estimator may have no settings: 'simple:'."
                )
        if not isinstance(data.get("controls", True), bool):
            raise HardAttentionError(
                f"controls={data['controls']!r} of {path} is invalid; use true (also run the controls) or false."
            )
        return cls(**data).with_controls()

    def with_controls(self) -> Comparison:
        """Return the comparison with the controls that its task supports, soft and random first."""
        if not self.controls:
            return self
        reduces = tasks.load(self.task, self.task_options).reduces
        added = [name for name in ALWAYS if name not in self.variants and (name != "downsampled" or reduces)]
        return replace(self, variants={**dict.fromkeys(added), **self.variants})

    def only(self, names: list[str] | None) -> Comparison:
        """Return the comparison restricted to the variants ``names``; all of them if None."""
        for name in names or ():
            if name not in self.variants:
                raise unknown("variant", name, self.variants)
        return replace(self, variants={n: v for n, v in self.variants.items() if n in names}) if names else self

    def settle(self, quick: bool = False) -> tuple[tasks.Base, tasks.Recipe, dict[str, dict[str, Any] | None]]:
        """Create and check the task, its recipe, and the fields of each variant's configuration (None: soft) before anything runs."""
        task = tasks.load(self.task, self.task_options)
        for name in self.recipe:
            if name not in tasks.Recipe.__dataclass_fields__:
                raise unknown("key of recipe:", name, tasks.Recipe.__dataclass_fields__, self.task)
        recipe = replace(task.recipe, **self.recipe)
        if quick:
            recipe = replace(recipe, trunk_steps=3, branch_steps=3)
        budget = task.budget if self.budget is None else self.budget
        return task, recipe, {name: _hard(name, given, task, budget, recipe) for name, given in self.variants.items()}


def _hard(
    name: str, given: dict[str, Any] | None, task: tasks.Base, budget: float, recipe: tasks.Recipe
) -> dict[str, Any] | None:
    if given is None and name in CONTROLS:
        given = CONTROLS[name]
        if given is None:
            return None
        if REDUCE in given:
            given = {REDUCE: budget}
    elif given is None:
        if name not in registry.names("estimators"):
            raise unknown("variant without fields:", name, {*CONTROLS, *registry.names("estimators")}, task.site)
        given = {"estimator": name}
    if REDUCE in given:
        return _reduced(name, given, task)
    base: dict[str, Any] = {"sites": [task.site], "budget": budget, "scorer": task.scorer}
    if given.get("scorer", task.scorer) == task.scorer:
        base["scorer_options"] = task.scorer_options
    fields = {**base, **given}
    if isinstance(fields["budget"], float) and "recipe" not in given and recipe.anneal:
        fields["budget"] = {"start": 1.0, "end": fields["budget"], "steps": recipe.anneal}
    HardAttentionConfig.from_dict(fields)  # raise now, not after the first base checkpoint
    return fields


def _reduced(name: str, given: dict[str, Any], task: tasks.Base) -> dict[str, Any]:
    """Return the fields of a variant that reads smaller inputs.

    Raises:
        HardAttentionError: the fields are not one valid ratio, or the inputs of the task cannot be reduced.
    """
    if not task.reduces:
        raise HardAttentionError(
            f"variant {name!r} reads smaller inputs, but the inputs of site '{task.site}' cannot be reduced; only images and rows of tokens can. "
            "Leave the variant out."
        )
    ratio = given[REDUCE]
    if given.keys() != {REDUCE} or isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise HardAttentionError(
            f"variant {name!r} is {given!r}; write full attention on smaller inputs as {{reduce: RATIO}}, with a number in (0, 1] and no other setting."
        )
    return {REDUCE: float(ratio)}
