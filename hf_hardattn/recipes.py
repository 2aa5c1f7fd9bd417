"""Recipes: named settings that were measured to train well."""

from __future__ import annotations

from typing import Any

from .errors import unknown

# The defaults of the fields that recipes set. A field with its default value takes the recipe's value.
_DEFAULTS: dict[str, Any] = {
    "anneal": None,
    "estimator": "simple",
    "estimator_options": {},
    "backward_temperature": None,
    "exploration": 0.0,
    "soft_rate": 0.0,
    "entropy_weight": 0.0,
    "self_distillation": 0.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    # Start from a trained soft model. The choice is deterministic, so that training and evaluation see the same model. Exact
    # marginals carry the gradient, and their temperature follows the scores, so that the gradient never vanishes. The budget
    # falls from everything to its target over the first 40 % of the training, whose length must be known.
    "robust": {"estimator_options": {"sample": False}, "backward_temperature": "adaptive", "anneal": 0.4},
}


def expand(recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that ``recipe`` changes.

    Args:
        recipe: a name of ``RECIPES``.
        given: all fields of the configuration, each of them valid.

    Raises:
        HardAttentionError: if the recipe is unknown.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    changed = {name: value for name, value in RECIPES[recipe].items() if given[name] == _DEFAULTS[name]}
    if given["estimator"] != "simple":
        changed.pop("estimator_options", None)
    return changed
