"""Recipes: settings that were measured to train well, by name."""

from __future__ import annotations

from typing import Any

from .errors import HardAttentionError, shown, unknown

# The defaults of the fields that recipes set: a field that stands there takes the recipe's value.
_DEFAULTS: dict[str, Any] = {
    "estimator": "simple",
    "estimator_options": {},
    "backward_temperature": None,
    "exploration": 0.0,
    "soft_rate": 0.0,
    "entropy_weight": 0.0,
    "self_distillation": 0.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    # Start from a trained soft model. The choice is deterministic, so that training and evaluation see the same model; exact
    # marginals carry the gradient, and their temperature follows the scores, so that it never dies; the budget falls from
    # everything to its target over the first 40 % of the training.
    "robust": {"estimator_options": {"sample": False}, "backward_temperature": "adaptive", "anneal": 0.4},
}


def expand(recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that ``recipe`` changes.

    Args:
        recipe: a name of ``RECIPES``.
        given: all fields of the configuration, each of them valid.

    Raises:
        HardAttentionError: unknown recipe, or an int budget, which cannot fall from a ratio of 1.0.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    settings = dict(RECIPES[recipe])
    anneal = settings.pop("anneal", None)
    changed = {name: value for name, value in settings.items() if given[name] == _DEFAULTS[name]}
    if given["estimator"] != "simple":
        changed.pop("estimator_options", None)
    if anneal:
        budgets = [given["budget"], *(site["budget"] for site in (given["sites"] or {}).values() if "budget" in site)]
        for budget in budgets:
            if isinstance(budget, int):
                raise HardAttentionError(
                    f"budget={shown(budget)} counts positions; recipe '{recipe}' lets the budget fall from 1.0, a ratio. Give the ratio to keep."
                )
        changed["budget"] = _fall(given["budget"], anneal)
        changed["sites"] = given["sites"] and {
            pattern: {**site, "budget": _fall(site["budget"], anneal)} if "budget" in site else site
            for pattern, site in given["sites"].items()
        }
    return changed


def _fall(budget: Any, share: float) -> Any:
    if not isinstance(budget, float) or budget == 1.0:  # a schedule already, or the scores decide
        return budget
    return {"start": 1.0, "end": budget, "steps": share}
