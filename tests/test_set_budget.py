"""``set_budget`` and ``load(budget=)`` change budgets and nothing else, however the configuration names its sites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from examples import build

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError
from hf_hardattn.modeling.attached import site_configs
from hf_hardattn.models import family_of

CONFIGS: dict[str, dict[str, Any]] = {
    "shared": {"sites": ["vision.self.*"], "share_selection": True},
    "scorers": {
        "sites": {"vision.tokens.1": {"scorer": "mlp"}, "vision.tokens.*": {"scorer": "linear", "budget": 0.7}}
    },
    "estimators": {
        "sites": {"vision.tokens.1": {"estimator": "hard_concrete"}, "vision.tokens.*": {"estimator": "rloo"}}
    },
    # two estimators with equal options, which are not inherited from one to the other
    "options": {
        "sites": {
            "vision.tokens.1": {"estimator": "rloo", "estimator_options": {"samples": 3}},
            "vision.tokens.*": {"budget": 5},
        },
        "estimator": "grpo",
        "estimator_options": {"samples": 3},
    },
    "automatic": {"sites": {"vision.tokens.1": {"budget": 2}, "*": {"anneal": 0.0}}},
}


def hard(name: str) -> Any:
    return hf_hardattn.apply(build("vit", "ViTForImageClassification").model, CONFIGS[name])


def sites(model: Any) -> dict[str, Any]:
    family: Any = family_of(model)
    return site_configs(family.towers(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_budget_for_all_changes_no_other_field_and_no_selector(name: str) -> None:
    model = hard(name)
    before, kept = sites(model), hf_hardattn.selectors(model)
    hf_hardattn.set_budget(model, 0.3)
    assert sites(model) == {site: replace(config, budget=0.3) for site, config in before.items()}
    after = hf_hardattn.selectors(model)
    assert after.keys() == kept.keys() and all(after[site] is kept[site] for site in kept)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_budget_of_one_site_is_that_of_the_sites_that_share_its_choice(name: str) -> None:
    model = hard(name)
    before, kept = sites(model), hf_hardattn.selectors(model)
    first = next(iter(kept))
    moved = set(before) if name == "shared" else {first}
    hf_hardattn.set_budget(model, {first: 4})
    wanted = {site: replace(config, budget=4) if site in moved else config for site, config in before.items()}
    assert sites(model) == wanted
    assert all(selector is kept[site] for site, selector in hf_hardattn.selectors(model).items())


@pytest.mark.parametrize("budget", [None, 0.3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_says_what_the_model_was(name: str, budget: float | None, tmp_path: Any) -> None:
    """A config.json sorts its keys, so the order of globs is lost in it."""
    model = hard(name)
    hf_hardattn.save(model, tmp_path)
    loaded: Any = hf_hardattn.load(tmp_path, budget=budget)
    wanted = sites(model if budget is None else hf_hardattn.set_budget(model, budget))
    assert sites(loaded) == wanted
    own, found = model.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys() and all(own[key].equal(found[key]) for key in own)


def test_globs_that_do_not_meet_stay_as_they_were_written() -> None:
    config = HardAttentionConfig(
        sites={"vision.tokens.1": {"budget": 2}, "vision.inputs": {"budget": 3}}, scorer="linear"
    )
    model: Any = hf_hardattn.apply(build("vit", "ViTForImageClassification").model, config)
    assert list(model.config.hard_attention["sites"]) == ["vision.tokens.1", "vision.inputs"]


@pytest.mark.parametrize("site", ["vision.tokens.9", "vision.self.1", "vision.self.*"])
def test_a_budget_of_what_is_no_site_is_refused_by_its_name(site: str) -> None:
    model = hard("shared")
    with pytest.raises(HardAttentionError, match=f"unknown site '{site}'".replace("*", r"\*")):
        hf_hardattn.set_budget(model, {site: 0.3})


def test_two_selectors_do_not_become_one_by_their_budgets() -> None:
    model: Any = build("vit", "ViTForImageClassification").model
    hf_hardattn.apply(model, {"sites": {"vision.self.0": 0.3, "vision.self.1": 0.5}, "share_selection": True})
    said = hf_hardattn.status(model)
    with pytest.raises(HardAttentionError, match="'vision.self.1' is that of 'vision.self.0'"):
        hf_hardattn.set_budget(model, 0.4)
    assert hf_hardattn.status(model) == said
