"""The configuration: the grammar of budgets and schedules, site globs, JSON both ways, and every message."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hardattn import HardAttentionConfig, HardAttentionError
from hf_hardattn.budget import Budget
from hf_hardattn.errors import missing_extra
from hf_hardattn.schedules import SHAPES, Schedule

SITES = ["vision.inputs", *(f"vision.{kind}.{layer}" for kind in ("self", "tokens") for layer in range(12))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": 1.3},
            r"budget=1.3 is out of range at 'the top level'; a float budget is the ratio to KEEP, in \(0, 1\]",
        ),
        ({"budget": 0.0}, "budget=0.0 is out of range"),
        ({"budget": 0}, "budget=0 is out of range .* an int budget counts positions to KEEP, >= 1"),
        ({"budget": True}, "budget=True is not a budget"),
        ({"budget": "half"}, "budget='half' is not a budget"),
        ({"budget": None}, "budget=None is not a budget"),
        ({"budget": "top_p:1.5"}, "budget='top_p:1.5' is out of range"),
        ({"budget": {"start": 1.0, "end": 1.5, "steps": 5}}, "budget=1.5 is out of range"),
        ({"budget": {"start": 1.0}}, "is not a schedule at 'the top level, budget'"),
        ({"estimator": "simpel"}, "unknown estimator 'simpel'; known: .*Did you mean 'simple'"),
        ({"scorer": "liner"}, "unknown scorer 'liner'; known: .*Did you mean 'linear'"),
        ({"baseline": "greedy"}, "unknown baseline 'greedy'; known: "),
        (
            {"scorer": "mlp", "scorer_options": {"hiden": 3}},
            "unknown option of scorer 'mlp': 'hiden' .*Did you mean 'hidden'",
        ),
        ({"scorer_options": 3}, "scorer_options=3 is not a dict"),
        ({"estimator": "reinforce", "estimator_options": {"law": "poisson"}}, "poisson"),
        ({"temperature": 0}, "temperature=0 is out of range at 'the top level'; it must stay > 0"),
        (
            {"temperature": {"start": 1, "end": 0.1, "steps": 0}},
            "steps=0 of a schedule at .*an int counts optimizer steps, >= 1",
        ),
        (
            {"temperature": {"start": 1, "end": 0.1, "steps": 5, "shape": "cosin"}},
            "unknown schedule shape 'cosin'.*Did you mean 'cosine'",
        ),
        ({"temperature": {"start": 1, "end": 0.1, "steps": 5, "stop": 2}}, "unknown schedule key 'stop'"),
        (
            {"temperature": {"start": 1, "end": -0.1, "steps": 5, "shape": "exponential"}},
            "an exponential schedule needs start > 0",
        ),
        ({"entropy_weight": -1}, "entropy_weight=-1 is out of range .*a loss weight is a number >= 0"),
        ({"execution": "dense"}, "unknown execution 'dense'"),
        ({"pack": "yes"}, "pack='yes' is not a choice at .*; use None .where the host knows the counts., True"),
        ({"sites": []}, "sites is empty"),
        (
            {"sites": {"vision.tokens.3": {"budgt": 1}}},
            "unknown site field 'budgt' at 'vision.tokens.3'.*Did you mean 'budget'",
        ),
        ({"sites": {"vision.tokens.3": {"budget": 1.3}}}, "budget=1.3 is out of range at 'vision.tokens.3'"),
        ({"schema_version": 99}, "schema_version=99 is newer than this hf_hardattn knows .*pip install -U hf-hardattn"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(HardAttentionError, match=message):
        HardAttentionConfig(**changes)


def test_unknown_key_in_json():
    with pytest.raises(
        HardAttentionError, match="unknown key of hard_attention: 'estimater'.*Did you mean 'estimator'"
    ):
        HardAttentionConfig.from_dict({"estimater": "simple"})
    with pytest.raises(HardAttentionError, match="hard_attention=3 is not a configuration"):
        HardAttentionConfig.parse(3)
    with pytest.raises(
        HardAttentionError, match="newer"
    ):  # a newer schema is named as such before its new keys confuse anybody
        HardAttentionConfig.from_dict({"schema_version": 3, "brand_new_key": 1})


def test_missing_extra_names_it():
    assert "pip install 'hf-hardattn[plots]'" in str(missing_extra("matplotlib", "plots", "a picture"))


def test_json_both_ways():
    config = HardAttentionConfig(
        sites={
            "vision.tokens.*": {"budget": 0.5},
            "vision.tokens.3": {"scorer": "mlp", "scorer_options": {"hidden": 7}},
        },
        budget={"start": 1.0, "end": 0.2, "steps": 10},
        estimator="reinforce",
    )
    again = HardAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.to_dict() == config.to_dict()
    assert config.to_dict()["schema_version"] == 2


def test_later_globs_win_and_defaults_hold():
    config = HardAttentionConfig(
        sites={"vision.tokens.*": {"budget": 0.5}, "vision.tokens.3": {"budget": 7, "scorer": "random"}},
        scorer="mlp",
        scorer_options={"hidden": 5},
    )
    resolved = config.resolve(SITES, ["vision.tokens.*"], "ViT")
    assert len(resolved) == 12
    assert resolved["vision.tokens.2"].budget == 0.5 and resolved["vision.tokens.2"].scorer_options == {"hidden": 5}
    assert resolved["vision.tokens.3"].budget == 7
    assert resolved["vision.tokens.3"].scorer_options == {}, "options belong to the scorer they were written for"


def test_recommended_sites_and_unmatched_patterns():
    assert list(HardAttentionConfig().resolve(SITES, ["vision.tokens.[36]"], "ViT")) == [
        "vision.tokens.3",
        "vision.tokens.6",
    ]
    with pytest.raises(
        HardAttentionError,
        match=r"no site matches 'decoder.cross.\*' in ViT; it has: 'vision.inputs', 'vision.self.0' ... 'vision.tokens.11'",
    ):
        HardAttentionConfig(sites=["decoder.cross.*"]).resolve(SITES, [], "ViT")
    assert HardAttentionConfig(sites=["decoder.cross.*"]).resolve(SITES, [], "ViT", ignore=["decoder"]) == {}


def test_frozen():
    with pytest.raises(AttributeError):
        HardAttentionConfig().budget = 3


@given(ratio=st.integers(1, 1000).map(lambda n: n / 1000), valid=st.integers(0, 300))
def test_ratio_is_the_exact_ceiling(ratio, valid):
    exact = 0 if valid == 0 else max(1, -(-round(ratio * 1000) * valid // 1000))
    mask = torch.arange(300) < valid
    budget = Budget.parse(ratio, "here")
    assert budget.count(torch.zeros(300), mask).item() == exact
    assert budget.slots(300) >= exact


def test_budgets_by_an_obvious_loop():
    torch.manual_seed(0)
    scores, valid = torch.randn(6, 11), torch.rand(6, 11) > 0.3
    for text, budget in (("threshold:0.6", None), ("top_p:0.7", None), (4, None), (0.4, None)):
        budget = Budget.parse(text, "here")
        for row, keep, k in zip(scores, valid, budget.count(scores, valid), strict=True):
            available = int(keep.sum())
            if budget.kind == "count":
                expected = 4
            elif budget.kind == "ratio":
                expected = math.ceil(round(0.4 * available, 9))
            elif budget.kind == "threshold":
                expected = sum(
                    1 / (1 + math.exp(-s)) > 0.6 for s, v in zip(row.tolist(), keep.tolist(), strict=True) if v
                )
            else:
                weights = sorted(
                    (math.exp(s) for s, v in zip(row.tolist(), keep.tolist(), strict=True) if v), reverse=True
                )
                total, mass, expected = sum(weights), 0.0, 0
                while mass < 0.7 * total:
                    mass += weights[expected]
                    expected += 1
            assert k.item() == min(max(1, expected), available)


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_start_and_end_where_they_say(shape):
    schedule = Schedule.parse({"start": 2.0, "end": 0.5, "steps": 10, "delay": 3, "shape": shape}, "here")
    values = [schedule(step) for step in range(20)]
    assert values[:4] == [2.0] * 4 and values[13:] == [0.5] * 7
    assert values == sorted(values, reverse=True) and len(set(values)) == 11
    assert Schedule.parse(3, "here")(100) == 3
