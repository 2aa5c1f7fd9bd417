"""The configuration: the grammar of budgets and schedules, site globs, JSON both ways, and every message."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hardattn import HardAttentionConfig, HardAttentionError, SiteConfig
from hf_hardattn.budget import Budget
from hf_hardattn.errors import missing_extra
from hf_hardattn.schedules import SHAPES, Schedule

ROOT = Path(__file__).resolve().parents[1]
SITES = ["vision.inputs", *(f"vision.{kind}.{layer}" for kind in ("self", "tokens") for layer in range(12))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": 1.3},
            r"budget=1.3 is out of range at 'the top level'; a float budget is the ratio to KEEP, in \(0, 1\]",
        ),
        ({"budget": 0.0}, "budget=0.0 is out of range"),
        ({"budget": 0}, "budget=0 is out of range .* an int budget is the number of positions to KEEP, >= 1"),
        ({"budget": True}, "budget=True is not a budget"),
        ({"budget": "half"}, "budget='half' is not a budget"),
        ({"budget": None}, "budget=None is not a budget"),
        ({"budget": "top_p:1.5"}, "budget='top_p:1.5' is out of range"),
        ({"budget": {"start": 1.0, "end": 1.5, "steps": 5}}, "budget=1.5 is out of range"),
        ({"budget": {"start": 1.0}}, "is not a schedule at 'the top level, budget'"),
        ({"estimator": "simpel"}, "unknown estimator 'simpel'; known: .*Did you mean 'simple'"),
        (
            {"scorer_options": {"hidden": 3}},
            "scorer_options=.* at 'the top level' belong to no scorer; scorer 'auto' is replaced by a named one .* Name the scorer: 'attention'",
        ),
        (
            {"anneal": 1.5},
            "anneal=1.5 is out of range at 'the top level'; it is a share of the training, >= 0 and <= 1",
        ),
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
        ({"pack": "yes"}, "pack='yes' is not a valid value at .*; use None .where the host knows the counts., True"),
        ({"sites": []}, "sites is empty"),
        (
            {"sites": {"vision.tokens.3": {"budgt": 1}}},
            "unknown site field 'budgt' at 'vision.tokens.3'.*Did you mean 'budget'",
        ),
        ({"sites": {"vision.tokens.3": {"budget": 1.3}}}, "budget=1.3 is out of range at 'vision.tokens.3'"),
        (
            {"schema_version": 99},
            "schema_version=99 is newer than this hf_hardattn supports .*pip install -U hf-hardattn",
        ),
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
        HardAttentionConfig.from_dict({"schema_version": 4, "brand_new_key": 1})


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
    assert config.to_dict()["schema_version"] == 3


def printed_by_javascript(value):
    """JSON of another writer, which prints 1.0 as 1."""
    if isinstance(value, dict):
        return {key: printed_by_javascript(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def test_counts_and_ratios_are_marked_in_json():
    config = HardAttentionConfig(
        budget=1.0,
        temperature={"start": 1.0, "end": 0.5, "steps": 1.0, "delay": 3},
        sites={
            "vision.inputs": 8,
            "vision.tokens.*": {"budget": {"start": 1.0, "end": 0.5, "steps": 1}},
            "*": "top_p:0.9",
        },
    )
    written = config.to_dict()
    assert written["budget"] == {"ratio": 1.0}
    assert written["temperature"] == {"start": 1.0, "end": 0.5, "steps": {"ratio": 1.0}, "delay": {"count": 3}}
    assert written["sites"] == {
        "vision.inputs": {"budget": {"count": 8}},
        "vision.tokens.*": {"budget": {"start": 1.0, "end": 0.5, "steps": {"count": 1}}},
        "*": {"budget": "top_p:0.9"},
    }
    again = HardAttentionConfig.parse(json.loads(json.dumps(printed_by_javascript(written))))
    assert again == config and again.to_dict() == written
    assert type(again.budget) is float and type(again.temperature["steps"]) is float
    assert type(again.sites["vision.inputs"]["budget"]) is int


def test_one_position_differs_from_all_of_them():
    one, everything = HardAttentionConfig(budget=1), HardAttentionConfig(budget=1.0)
    assert one != everything and one == HardAttentionConfig(budget={"count": 1})
    assert everything == HardAttentionConfig(budget={"ratio": 1})
    assert SiteConfig(budget=1) != SiteConfig(budget=1.0) and SiteConfig() != HardAttentionConfig()


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/finetuning/*.json")), ids=lambda path: path.stem)
def test_schema_1_is_read_as_it_was_meant(path):
    """Configurations that version 1 wrote: bare numbers, an int counts and a float is a ratio."""
    old = json.loads(path.read_text())["hard_attention"]
    assert old["schema_version"] == 1
    config = HardAttentionConfig.from_dict(old)
    assert config.budget == old["budget"] and type(config.budget) is type(old["budget"])
    for pattern, overrides in old["sites"].items():
        assert config.sites[pattern] == overrides
    assert config.to_dict()["schema_version"] == 3
    assert HardAttentionConfig.from_dict(config.to_dict()) == config


def test_schema_1_counts_and_ratios():
    for old, new in ((8, {"count": 8}), (1.0, {"ratio": 1.0}), ("threshold:0.5", "threshold:0.5")):
        config = HardAttentionConfig.from_dict({"budget": old, "schema_version": 1})
        assert config.budget == old and type(config.budget) is type(old) and config.to_dict()["budget"] == new


@pytest.mark.parametrize("version", [0, -1, True, "2", 2.0, None, math.nan])
def test_schema_version_is_a_small_int(version):
    for make in (
        HardAttentionConfig,
        lambda schema_version: HardAttentionConfig.from_dict({"schema_version": schema_version}),
    ):
        with pytest.raises(
            HardAttentionError, match="schema_version=.* is not a valid version; it must be an int from 1 to 3"
        ):
            make(schema_version=version)


@pytest.mark.parametrize(
    "budget", [8, 0.5, "threshold:0.5", {"count": 8}, {"ratio": 1}, {"start": 1, "end": 0.5, "steps": 9}]
)
def test_a_site_may_be_a_budget_alone(budget):
    assert HardAttentionConfig(sites={"vision.inputs": budget}) == HardAttentionConfig(
        sites={"vision.inputs": {"budget": budget}}
    )


def test_configuration_does_not_share_its_options():
    options = {"hidden": 5}
    config = HardAttentionConfig(scorer="mlp", scorer_options=options)
    config.to_dict()["scorer_options"]["hidden"] = options["hidden"] = 6
    assert config.scorer_options == {"hidden": 5}


def test_patterns_that_contradict_each_other_are_refused_where_they_meet():
    config = HardAttentionConfig(
        sites={"vision.tokens.*": {"estimator": "rloo"}, "vision.*.3": {"soft_rate": 0.5}, "vision.tokens.4": 3}
    )
    assert set(config.resolve([site for site in SITES if site != "vision.tokens.3"], [], "ViT")) >= {"vision.tokens.4"}
    with pytest.raises(HardAttentionError, match="soft_rate=0.5 at 'vision.tokens.3' .* estimator 'rloo'"):
        config.resolve(SITES, [], "ViT")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_head": "false"},
            "per_head='false' is not a valid value at 'the top level'; use True .each head selects. or False",
        ),
        (
            {"restore": 1},
            "restore=1 is not a valid value at 'the top level'; use None .the model decides., True .* or False",
        ),
        ({"pack": 0}, "pack=0 is not a valid value"),
        ({"scorer": []}, r"scorer=\[\] is not a name at 'the top level'"),
        ({"recipe": {}}, "unknown recipe {}; known: 'robust'"),
        ({"sites": 1.0}, "sites=1.0 does not name sites"),
        ({"sites": {"a": False}}, "sites maps 'a' to False; use a dict of fields, or a budget"),
        ({"sites": {"a": 0}}, "budget=0 is out of range at 'a'"),
        ({"sites": {3: {}}}, "sites contains 3; a glob is a string"),
        ({"score_function_weight": "x"}, "score_function_weight='x' is out of range"),
        ({"temperature": math.nan}, "value=nan of a schedule at 'the top level, temperature' is not a finite number"),
        ({"temperature": 1e-40}, "temperature=1e-40 is out of range .* it must stay > 0, >= 1e-06"),
        ({"budget": 2**63}, "budget=9223372036854775808 is out of range"),
        ({"budget": 10**5000}, "budget=<int of 16610 bits> is out of range"),
        ({"budget": {"count": 2.5}}, r"budget={'count': 2.5} is out of range .* Write {\"count\": 8} or"),
        ({"budget": {"start": 8, "end": 4, "steps": 9}}, "budget=8 is out of range .* a count cannot be scheduled"),
        (
            {"temperature": {"start": "1.0", "end": 1, "steps": 3}},
            "start='1.0' of a schedule at .* is not a finite number",
        ),
        (
            {"temperature": {"start": 1, "end": 1, "steps": 3, "delay": 10**400}},
            "delay=<int|delay=1000.* of a schedule",
        ),
        ({"baseline_options": {"args": 1}}, "unknown option of baseline 'moving_average': 'args'"),
        (
            {"scorer": "linear", "scorer_options": {"hidden": 3}},
            "unknown option of scorer 'linear': 'hidden' .*; there are none",
        ),
        (
            {"scorer": "mlp", "scorer_options": {"hidden": -1}},
            "hidden=-1 is out of range at scorer mlp .scorer_options of 'the top level'.; it must be an int >= 1 and <= 8192",
        ),
        ({"scorer": "mlp", "scorer_options": {"hidden": 0.5}}, "hidden=0.5 has the wrong type at scorer mlp"),
        (
            {"estimator": "rloo", "estimator_options": {"samples": "x"}},
            "samples='x' has the wrong type at estimator rloo",
        ),
        (
            {"estimator_options": {"sample": 1}},
            "sample=1 has the wrong type at estimator simple .*; it must be True or False",
        ),
    ],
)
def test_wrong_types_and_sizes(changes, message):
    with pytest.raises(HardAttentionError, match=message):
        HardAttentionConfig.from_dict(changes)


def test_a_site_configuration_checks_itself():
    with pytest.raises(HardAttentionError, match="unknown execution 'maskd'.*Did you mean 'masked'"):
        SiteConfig(execution="maskd")
    with pytest.raises(HardAttentionError, match="unknown field of HardAttentionConfig: 'budgt'"):
        HardAttentionConfig().replace(budgt=3)


def test_errors_stay_short():
    many = {f"key {n}" * 100: "x" * 100_000 for n in range(1000)}
    for changes in ({"scorer": "x" * 100_000}, {"budget": many}, {"sites": many}, {"scorer_options": many}, many):
        with pytest.raises(HardAttentionError) as caught:
            HardAttentionConfig.from_dict(changes)
        assert len(str(caught.value)) < 3000


def test_twenty_thousand_globs_are_read_at_once():
    started = time.process_time()
    config = HardAttentionConfig(sites={f"vision.tokens.{n}": {"budget": 1 + n % 7} for n in range(20_000)})
    with pytest.raises(HardAttentionError, match="no site matches 'vision.tokens.12' in ViT"):
        config.resolve(SITES, [], "ViT")
    assert time.process_time() - started < 3, "it took 18 s when each glob built an estimator"


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
