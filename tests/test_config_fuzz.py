"""10,000 generated configurations: each is accepted as it was meant, and works, or is refused with an error that names the field.

What is legal is written down here a second time, as plain predicates, so that the library and this file check each other.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from hf_hardattn import HardAttentionConfig, HardAttentionError, registry
from hf_hardattn.budget import Budget, budget_schedule
from hf_hardattn.estimators import Sampling
from hf_hardattn.options import option_rules
from hf_hardattn.schedules import Schedule

COUNT = 10_000
SITES = ["vision.inputs", "vision.tokens.3", "vision.self.2", "encoder.tokens.0", "décodeur.0"]
GLOBS = [*SITES, "vision.*", "*", "vision.tokens.[0-9]", "*.inputs", "?ision.self.*", "d*"]


# What is legal ------------------------------------------------------------------------------------------------------------------


def integer(low, high):
    return lambda v: type(v) is int and low <= v <= high


def number(low, high, above=False, below=False):
    def legal(v):
        if type(v) not in (int, float) or not low <= v <= high:
            return False
        return not (above and v == low or below and v == high)

    return legal


def one_of(*values):
    def legal(v):
        return any(
            v is value or type(v) is type(value) and type(v) in (str, bool, int) and v == value for value in values
        )

    return legal


FLAG = one_of(True, False)
OPTIONS: dict[str, dict[str, Any]] = {
    "conv": {"hidden": integer(1, 8192), "frames": integer(1, 65_536), "whole_frames": FLAG},
    "key_norm": {"keep": one_of("low", "high")},
    "mlp": {"hidden": integer(1, 8192)},
    "query_key": {"size": integer(1, 8192), "monotonic": FLAG},
    "random": {"seed": integer(0, 2**31 - 1)},
    "recurrent": {
        "size": integer(1, 4096),
        "glimpses": integer(1, 4096),
        "halting_cost": lambda v: v is None or number(0, 1e6)(v),
        "monotonic": FLAG,
    },
    "scout": {"hidden": integer(1, 8192), "cells": integer(1, 256)},
    "static": {"positions": integer(1, 2**20)},
    "distil": {"weight": number(0, 1e6)},
    "cropr": {"weight": number(0, 1e6)},
    "entmax": {"alpha": number(1.001, 2), "hard": FLAG},
    "gumbel": {"hard": FLAG},
    "grpo": {"samples": integer(2, 1024), "law": one_of("plackett_luce", "conditional_bernoulli")},
    "gumbel_rao": {"draws": integer(1, 10_000)},
    "hard_concrete": {"temper": number(1e-6, 1e6), "stiffness": number(0, 1e6)},
    "imle": {"strength": number(1e-6, 1e6), "adaptive": FLAG, "noise": one_of("gumbel", "sum_of_gamma")},
    "log_gate": {"hard": FLAG},
    "marginal": {
        "objective": one_of("likelihood", "expectation"),
        "limit": integer(1, 65_536),
        "monotonic": FLAG,
    },
    "perturbed": {"draws": integer(2, 10**6), "sigma": number(1e-6, 1e6), "hard": FLAG},
    "reinforce": {"law": one_of("plackett_luce", "conditional_bernoulli")},
    "reinmax_rao": {"draws": integer(1, 10_000), "tau": number(1e-6, 1e6)},
    "rloo": {"samples": integer(2, 1024)},
    "sfess": {"samples": integer(2, 1024)},
    "simple": {"sample": FLAG},
    "sparsemax": {"hard": FLAG},
    "straight_through": {"surrogate": one_of("sigmoid", "balanced", "softmax", "identity")},
    "variational": {"weight": number(0, 1e6)},
    "learned": {"hidden": integer(1, 8192), "weight": number(0, 1e6)},
    "leave_one_out": {"all_ranks": FLAG},
    "moving_average": {"momentum": number(0, 1, below=True), "whiten": FLAG},
}
KINDS = {"scorer": "scorers", "estimator": "estimators", "baseline": "baselines"}
NAMES = {kind: registry.names(folder) for kind, folder in KINDS.items()}
NAMES["scorer"] += ("auto",)


def amount(value):
    """The number that a bare or a marked amount stands for; None where it stands for none."""
    if isinstance(value, dict) and set(value) == {"count"}:
        whole = number(-(2**31) + 1, 2**31 - 1)(value["count"]) and value["count"] == int(value["count"])
        return int(value["count"]) if whole else None
    if isinstance(value, dict) and set(value) == {"ratio"}:
        return float(value["ratio"]) if number(0, 1)(value["ratio"]) else None
    return value if type(value) in (int, float) else None


def steps(value, low):
    value = amount(value)
    return integer(low, 2**31 - 1)(value) or type(value) is float and 0 < value <= 1


def sampled(value):
    ends = value.get("sample") if isinstance(value, dict) and len(value) == 1 else None
    fine = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(number(0, 1, above=True)(end) for end in ends)
    return fine and ends[0] < ends[1]


def schedule(legal):
    def check(value):
        if type(value) in (int, float):
            return legal(value)
        if not isinstance(value, dict) or not {"start", "end", "steps"} <= set(value):
            return False
        if set(value) - {"start", "end", "steps", "delay", "shape", "stages"}:
            return False
        start, end, shape = amount(value["start"]), amount(value["end"]), value.get("shape", "linear")
        return (
            legal(start)
            and legal(end)
            and steps(value["steps"], 1)
            and steps(value.get("delay", 0), 0)
            and integer(0, 2**31 - 1)(amount(value.get("stages", 0)))
            and one_of("linear", "cosine", "exponential")(shape)
            and (shape != "exponential" or min(start, end) >= 1e-12)
        )

    return check


def budget(value):
    if isinstance(value, str):
        match = re.fullmatch(r"(threshold|top_p):([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)", value, re.ASCII)
        return bool(match) and 0 < float(match[2]) < 1
    if isinstance(value, dict) and "sample" in value:
        return sampled(value)
    if isinstance(value, dict) and "start" in value:
        return schedule(number(0, 1, above=True))(value)
    value = amount(value)
    return integer(1, 2**31 - 1)(value) or type(value) is float and 0 < value <= 1


temperature, probability, weight = (schedule(number(*r)) for r in ((1e-6, 1e6), (0, 1), (0, 1e6)))
LEGAL: dict[str, Any] = {
    "budget": budget,
    "temperature": temperature,
    "backward_temperature": lambda v: v is None or one_of("adaptive")(v) or temperature(v),
    "exploration": probability,
    "soft_rate": probability,
    "entropy_weight": weight,
    "score_function_weight": number(0, 1e6),
    "per_head": FLAG,
    "share_selection": FLAG,
    "execution": one_of("auto", "masked", "gathered"),
    "pack": one_of(None, True, False),
    "anneal": lambda v: v is None or number(0, 1)(v),
    **{kind: one_of(*NAMES[kind]) for kind in KINDS},
}
LEGAL_ABOVE = {
    "self_distillation": weight,
    "restore": one_of(None, True, False),
    "recipe": one_of(None, "robust"),
    "schema_version": integer(1, 3),
}
DEFAULTS = {f: getattr(HardAttentionConfig(), f) for f in (*LEGAL, *(f"{kind}_options" for kind in KINDS))}


def faults_of_options(site):
    """Names in ``site`` that are illegal as options."""
    faults = []
    for kind in KINDS:
        options = site[f"{kind}_options"]
        if not isinstance(options, dict):
            faults.append(f"{kind}_options")
        elif LEGAL[kind](site[kind]):
            known = OPTIONS.get(site[kind], {})
            faults += [str(name) for name, v in options.items() if name not in known or not known[name](v)]
    options = site["estimator_options"]
    if one_of("marginal")(site["estimator"]) and isinstance(options, dict):
        if options.get("monotonic") is True and one_of("expectation")(options.get("objective")):
            faults.append("monotonic=True")
    return faults


def faults_together(site):
    """Words of the error for fields that do not go together, each of them legal."""
    if not all(LEGAL[name](site[name]) for name in ("scorer", "estimator", "budget", "soft_rate")):
        return []
    estimator = registry.load("estimators", site["estimator"])
    sequential = site["scorer"] == "recurrent"
    own_count = not estimator.exact_budget and site["estimator"] != "soft"
    one_look = {"teacher", "choices", "target", "class"} & set(estimator.needs)
    faults = ["glimpses"] if sequential and (one_look or own_count or isinstance(site["budget"], str)) else []
    return [*faults, "soft_rate"] if site["soft_rate"] and "gates" not in estimator.needs else faults


def faults_of(data):
    """What is wrong with a configuration: words of which the error has to hold one. Nothing where it is legal."""
    if not LEGAL_ABOVE["schema_version"](data.get("schema_version", 3)):
        return ["schema_version"]
    known = {*DEFAULTS, *LEGAL_ABOVE, "sites"}
    faults = [repr(name)[:40] for name in data if name not in known]
    faults += [name for name in data if name in LEGAL and not LEGAL[name](data[name])]
    faults += [name for name in data if name in LEGAL_ABOVE and not LEGAL_ABOVE[name](data[name])]
    old = {"scorer": "linear"} if data.get("schema_version") in (1, 2) else {}
    top = {**DEFAULTS, **old, **{name: value for name, value in data.items() if name in DEFAULTS}}
    faults += faults_of_options(top)
    sites = data.get("sites")
    if sites is not None and (not isinstance(sites, (str, list, dict)) or not sites):
        return [*faults, "sites"]
    for glob in [sites] if isinstance(sites, str) else sites or ():
        overrides = sites[glob] if isinstance(sites, dict) else None
        overrides = {"budget": overrides} if bare(overrides) else {} if overrides is None else overrides
        if not isinstance(glob, str) or not 0 < len(glob) <= 500 or not isinstance(overrides, dict):
            faults.append("sites")
            continue
        faults += [repr(name)[:40] for name in overrides if name not in DEFAULTS]
        faults += [name for name in overrides if name in LEGAL and not LEGAL[name](overrides[name])]
        site = merged(top, overrides)
        faults += faults_of_options(site)
        faults += faults_together(site)
    faults += faults_together(top)
    return faults


def bare(overrides):
    """Whether a site's value is a budget alone."""
    if isinstance(overrides, dict):
        return len(overrides) == 1 and set(overrides) <= {"count", "ratio"} or {"start", "sample"} & overrides.keys()
    return isinstance(overrides, str) or type(overrides) in (int, float)


def merged(top, overrides):
    site = dict(top)
    for kind in KINDS:
        if kind in overrides and not one_of(top[kind])(overrides[kind]):
            site[f"{kind}_options"] = {}
    return {**site, **{name: value for name, value in overrides.items() if name in DEFAULTS}}


# What is generated --------------------------------------------------------------------------------------------------------------


def deep(levels):
    value: Any = 1
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return value


class Hostile:
    def __repr__(self):
        raise RuntimeError("no text for you")


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53 + 1, 2**63, 10**400, -(10**400), 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.5, math.nan, math.inf, -math.inf, 1e-40, 1e-7, 1e308, 5e-324, 1e30),
    *("", "x", "simple", "linear", "none", "1.0", "True", "false", "auto", "maskd", "adaptive", "robust", "\x00", "\ud800", "ä" * 9),
    *("threshold:nan", "threshold:", "threshold:0.5 ", "threshold:0_5", "threshold:٠.٥", "top_p:1e-3", "top_p:1", "top_p", ":0.5"),
    *("__init__", "../x", "args", "a" * 100_000, "*" * 600, b"bytes", "hidden"),
    *([], [1], ["linear"], (), (1,), {1, 2}, {}, {"a": 1}, {1: 2}, {None: None}, {"args": 1}, {"kwargs": {}}, {"self": 1}),
    *({"count": 3}, {"count": 2.0}, {"count": 2.5}, {"count": True}, {"count": -1}, {"count": 10**400}, {"count": "3"}, {"count": None}),
    *({"ratio": 1}, {"ratio": 0.25}, {"ratio": 2}, {"ratio": 0}, {"ratio": "1"}, {"ratio": math.nan}, {"count": 3, "ratio": 0.5}),
    *({"start": 1}, {"start": "1.0", "end": 1, "steps": 3}, {"start": 1.0, "end": 10**400, "steps": 1}, {"end": 1}),
    *({"hidden": -1}, {"hidden": 0.5}, {"hidden": 10**12}, {"samples": "x"}, {"hidden_size": 3}, {"draws": True}, {"sample": "no"}),
    *(deep(200), deep(20), [0] * 2000, {str(i): i for i in range(2000)}, list("ab"), range(10**9)),
    *(object(), Hostile(), int, print, lambda: 1, torch.zeros(2), torch.tensor(1.0), np.zeros(3), np.int64(3), np.float32(0.5), 1j),
]  # fmt: skip


def pick(draw, values):
    return values[draw.randrange(len(values))]


def a_number(draw, low, high):
    """A number of [low, high], its ends now and then."""
    kind = draw.random()
    if kind < 0.1:
        return pick(draw, [low, high])
    return math.exp(draw.uniform(math.log(low or 1e-6), math.log(high))) if kind < 0.7 else draw.uniform(low, high)


def a_schedule(draw, low, high):
    value = {"start": a_number(draw, low, high), "end": a_number(draw, low, high)}
    value["steps"] = pick(draw, [1, 100, 0.4, 1.0, {"count": 7}, {"ratio": 1}, {"ratio": 0.5}])
    if draw.random() < 0.3:
        value["delay"] = pick(draw, [0, 5, 0.1, {"count": 0}, {"ratio": 0.2}])
    if draw.random() < 0.3:
        value["shape"] = pick(draw, ["linear", "cosine", "exponential"])
    if draw.random() < 0.2:
        value["stages"] = pick(draw, [0, 3])
    if draw.random() < 0.05:
        value[pick(draw, ["start", "end", "steps", "delay", "shape", "stages", "stop"])] = pick(draw, JUNK)
    return value


def scheduled(low, high):
    return lambda draw: a_number(draw, low, high) if draw.random() < 0.6 else a_schedule(draw, low, high)


def a_budget(draw):
    if draw.random() < 0.2:
        return a_schedule(draw, 0.05, 1)
    if draw.random() < 0.05:
        return {"sample": pick(draw, [[0.1, 1.0], (0.25, 0.5), [0.1, 1], [0.5], [0.5, 0.1], [1, 8], "0.1"])}
    ratio = round(draw.uniform(0.01, 1), 3)
    marked = [{"count": draw.randint(1, 30)}, {"ratio": ratio}, {"ratio": 1}]
    return pick(draw, [draw.randint(1, 30), ratio, 1.0, 1, f"threshold:{ratio / 2}", f"top_p:{ratio / 2}", *marked])


SMALL = {int: [1, 2, 3, 5, 16], float: [0, 0.5, 0.9, 1.5, 2.0, 1, 0.0], str: ["low", "gumbel", "identity", "expectation"], bool: [True, False]}  # fmt: skip


def some_options(draw, name):
    """Options of a member, legal ones mostly."""
    options = {}
    for option, legal in OPTIONS.get(name, {}).items():
        if draw.random() < 0.4:
            values = [v for kind in SMALL.values() for v in kind if legal(v)] or JUNK
            options[option] = pick(draw, values if draw.random() < 0.9 else JUNK)
    if draw.random() < 0.03:
        options[pick(draw, ["hiden", "args", "kwargs", "heads", "self", ""])] = pick(draw, JUNK[:30])
    return options


GOOD: dict[str, Any] = {
    "budget": a_budget,
    "temperature": scheduled(1e-6, 1e6),
    "backward_temperature": lambda draw: pick(draw, [None, "adaptive", a_number(draw, 1e-6, 1e6)]),
    "exploration": scheduled(0, 1),
    "soft_rate": scheduled(0, 1),
    "entropy_weight": scheduled(0, 1e6),
    "score_function_weight": lambda draw: a_number(draw, 0, 1e6),
    "per_head": lambda draw: pick(draw, [True, False]),
    "share_selection": lambda draw: pick(draw, [True, False]),
    "execution": lambda draw: pick(draw, ["auto", "masked", "gathered"]),
    "pack": lambda draw: pick(draw, [None, True, False]),
    "anneal": lambda draw: pick(draw, [None, 0, 0.4, 1.0]),
    "self_distillation": scheduled(0, 1e6),
    "restore": lambda draw: pick(draw, [None, True, False]),
    "recipe": lambda draw: pick(draw, [None, "robust"]),
    "schema_version": lambda draw: pick(draw, [1, 2, 3]),
}


def some_fields(draw, known, most):
    fields: dict[str, Any] = {name: GOOD[name](draw) for name in draw.sample(known, draw.randint(0, most))}
    for kind in KINDS:
        if draw.random() < 0.4:
            fields[kind] = pick(draw, NAMES[kind])
            if draw.random() < 0.6:
                fields[f"{kind}_options"] = some_options(draw, fields[kind])
    return fields


def a_configuration(draw):
    """Fields of a configuration; in half of all cases one or two of them are anything."""
    data = some_fields(draw, list(GOOD), 4)
    shape = draw.random()
    if shape < 0.4:
        site = [name for name in GOOD if name in LEGAL]
        globs = draw.sample(GLOBS, draw.randint(1, 3))
        data["sites"] = {
            glob: pick(draw, [None, a_budget(draw), some_fields(draw, site, 3), some_fields(draw, site, 3)])
            for glob in globs
        }
    elif shape < 0.6:
        data["sites"] = draw.sample(GLOBS, draw.randint(1, 3)) if shape < 0.5 else pick(draw, GLOBS)
    for _ in range(pick(draw, [0, 0, 1, 2])):
        place = data
        inner = [
            v for v in (data.get("sites") if isinstance(data.get("sites"), dict) else {}).values() if type(v) is dict
        ]
        if inner and draw.random() < 0.4:
            place = pick(draw, inner)
        elif isinstance(data.get("sites"), dict) and draw.random() < 0.2:
            place = data["sites"]
        names = [*place, *DEFAULTS, "sites", "budgt"] if place is data else [*place, *DEFAULTS, "sites"]
        place[pick(draw, names)] = pick(draw, JUNK)
    return data


# What is checked ----------------------------------------------------------------------------------------------------------------


def meaning(name, value):
    """What a field says, in one form for bare and marked numbers."""
    if isinstance(value, dict) and "start" in value:
        filled = {"delay": 0, "shape": "linear", "stages": 0, **value}
        read = {key: amount(v) if key != "shape" else v for key, v in filled.items()}
        return {key: (type(v) if key in ("steps", "delay") else None, v) for key, v in read.items()}
    if name == "budget" and isinstance(value, dict) and "sample" in value:
        return [float(end) for end in value["sample"]]
    if name == "budget" and not isinstance(value, str):
        return type(amount(value)), amount(value)
    return value


def with_integers(value):
    """JSON as other writers print it: 1.0 as 1."""
    if isinstance(value, dict):
        return {key: with_integers(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, float) and value == int(value) else value


def assert_as_meant(config, data):
    if data.get("schema_version") == 1:  # may have former defaults; tests/test_version1.py says which
        data = {name: value for name, value in data.items() if name not in ("estimator_options", "sites")}
    if data.get("recipe") is None:
        for name in data.keys() & DEFAULTS.keys():
            assert meaning(name, getattr(config, name)) == meaning(name, data[name]), name
        given = [(glob, v) for glob, v in data["sites"].items()] if isinstance(data.get("sites"), dict) else []
        for glob, overrides in given:
            overrides = {"budget": overrides} if bare(overrides) else overrides or {}
            assert config.sites[glob].keys() == overrides.keys()
            for name, value in overrides.items():
                assert meaning(name, config.sites[glob][name]) == meaning(name, value), name
    written = config.to_dict()
    for text in (json.dumps(written, allow_nan=False), json.dumps(with_integers(written), allow_nan=False)):
        again = HardAttentionConfig.parse(json.loads(text))
        assert again == config and again.to_dict() == written


def assert_works(site, choose):
    """Build the parts of a site; with ``choose``, choose once in training, with gradient. Whatever comes out is finite."""
    name = "linear" if site.scorer == "auto" else site.scorer
    scorer = registry.load("scorers", name)(hidden_size=6, query_size=6, heads=1, **site.scorer_options)
    estimator = registry.load("estimators", site.estimator)(**site.estimator_options)
    registry.load("baselines", site.baseline)(**site.baseline_options).build(6)
    now = {
        name: Schedule.parse(getattr(site, name), name)(3, 10)
        for name in ("temperature", "exploration", "soft_rate", "entropy_weight")
    }
    assert all(map(math.isfinite, now.values())) and scorer.hidden_size == 6
    scheduled = isinstance(site.budget, dict)
    keep = Budget.parse(budget_schedule(site.budget, "budget")(3, 10) if scheduled else site.budget, "budget")
    assert 0 < keep.slots(5) <= 5
    if not choose or site.estimator_options.get("draws", 0) > 100:
        return
    scores = torch.tensor([[0.3, -2.0, 1.0, 0.2, 0.1], [4.0, 0.0, 1.5, -3.0, 2.0]], requires_grad=True)
    valid = torch.tensor([[True] * 5, [True, True, True, True, False]])
    backward = site.backward_temperature
    backward = None if backward in (None, "adaptive") else Schedule.parse(backward, "backward")(3, 10)
    sampling = Sampling(torch.rand, now["temperature"], backward, now["exploration"])
    k = keep.count(scores.detach(), valid)
    choice = estimator.choose(scores, k, valid, slots=keep.slots(5), sampling=sampling)
    terms = [t for t in (choice.gates, choice.log_prob, choice.entropy, choice.penalty) if t is not None]
    loss = sum(((term * torch.arange(1, 1 + term.shape[-1])).sum() for term in terms), scores.new_zeros(()))
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, scores)
        assert gradient.isfinite().all(), (site.estimator, site.estimator_options, now, backward)
    assert loss.isfinite(), (site.estimator, site.estimator_options, now, backward)


def refusal(call):
    """The library's own error of ``call``, or its result; any other error is a fault."""
    try:
        return call(), None
    except HardAttentionError as error:
        assert len(str(error)) < 3000
        return None, str(error)


def check(data, draw, seen):
    known = all(isinstance(name, str) and name in {*DEFAULTS, *LEGAL_ABOVE, "sites"} for name in data)
    make = HardAttentionConfig if known and draw.random() < 0.3 else None
    config, message = refusal(lambda: make(**data) if make else HardAttentionConfig.from_dict(data))
    faults = faults_of(data)
    if message is not None:
        assert faults, f"refused, and legal: {message}"
        assert any(word in message for word in faults) and "; " in message, (faults, message)
        seen["refused"] += 1
        return
    assert not faults, f"accepted, and illegal: {faults}"
    seen["accepted"] += 1
    assert_as_meant(config, data)
    resolved, _ = refusal(lambda: config.resolve(SITES, ["vision.inputs"], "a model"))
    for site in list((resolved or {}).values())[:1]:
        assert_works(site, choose=seen["used"] % 3 == 0)  # one in three: most of the time goes into the gradients
        seen["used"] += 1


def test_generated_configurations(recwarn):
    torch.manual_seed(0)
    draw, seen = random.Random(0), Counter()
    for index in range(COUNT):
        data = a_configuration(draw)
        try:
            check(data, draw, seen)
        except Exception as error:
            raise AssertionError(f"configuration {index}: {str(data)[:2000]}") from error
    assert seen["accepted"] + seen["refused"] == COUNT
    assert seen["accepted"] > COUNT / 5 and seen["refused"] > COUNT / 5 and seen["used"] > COUNT / 6, seen
    print(dict(seen))


def test_every_option_is_in_this_file():
    for folder in KINDS.values():
        for name in registry.names(folder):
            assert set(option_rules(registry.load(folder, name))) == set(OPTIONS.get(name, {})), name


@pytest.mark.parametrize("name", [*DEFAULTS, *LEGAL_ABOVE, "sites"])
def test_every_field_with_everything(name):
    """Each kind of junk in each field, alone."""
    draw, seen = random.Random(1), Counter()
    for value in JUNK:
        check({name: value}, draw, seen)
        if name in DEFAULTS:
            check({"sites": {"vision.inputs": {name: value}}}, draw, seen)
    assert seen["refused"] > len(JUNK) / 2
