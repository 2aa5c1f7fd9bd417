"""One checkpoint for any budget: every training step draws its ratio."""

from __future__ import annotations

import json

import pytest
from examples import build

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError
from hf_hardattn.budget import final_budget
from hf_hardattn.schedules import Sampled


def test_the_draws_cover_the_range_evenly_from_the_first_steps():
    sampled = Sampled(0.1, 0.8)
    drawn = [sampled(step) for step in range(30)]
    assert all(0.1 <= ratio <= 0.8 for ratio in drawn)
    thirds = [sum(low <= ratio < 2 * low for ratio in drawn) for low in (0.1, 0.2, 0.4)]
    assert thirds == [10, 10, 10]
    assert sampled(7) == drawn[7]  # no state: a resumed training draws the same


def kept(model, batch):
    with hf_hardattn.record(model) as selections:
        model(**batch)
    return [int(selection.mask.sum(-1).max()) - 1 for selection in selections]


@pytest.mark.parametrize("estimator", ["simple", "rloo"])
def test_steps_draw_and_evaluation_takes_any_budget(estimator):
    example = build("vit", "ViTForImageClassification", image_size=16)  # 16 patches
    budget = {"sample": [0.2, 0.9]}
    hf_hardattn.apply(example.model, {"sites": ["vision.inputs"], "budget": budget, "estimator": estimator})
    example.model.train()
    counts = set()
    for step in range(8):
        hf_hardattn.set_step(example.model, step, 8)
        counts.update(kept(example.model, example.batch))
    assert len(counts) > 4 and 4 <= min(counts) and max(counts) <= 15
    example.model.eval()
    assert kept(example.model, example.batch) == [4]  # the lower end, until something else is said
    for ratio, expected in ((0.5, 8), (1.0, 16), (7, 7)):
        hf_hardattn.set_budget(example.model, ratio)
        assert kept(example.model, example.batch) == [expected]


def test_json_both_ways():
    config = HardAttentionConfig(
        budget={"sample": (0.1, 1)}, sites={"vision.inputs": {"sample": [0.25, 0.5]}, "*": 0.5}
    )
    assert config.budget == {"sample": [0.1, 1.0]} and config.sites["vision.inputs"] == {
        "budget": {"sample": [0.25, 0.5]}
    }
    assert HardAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert final_budget(config.budget) == 0.1 and final_budget({"ratio": 0.5}) == {"ratio": 0.5}


@pytest.mark.parametrize("ends", [[0.5], [0.5, 0.2], [0.0, 0.5], [1, 8], ["0.1", 1], 0.5, None])
def test_what_is_no_range(ends):
    with pytest.raises(
        HardAttentionError, match="a sampled budget is two ratios to KEEP, the lower one first, in .0, 1."
    ):
        HardAttentionConfig(budget={"sample": ends})


def test_a_range_needs_steps():
    example = build("vit", "ViTForImageClassification")
    hf_hardattn.apply(example.model, {"sites": ["vision.inputs"], "budget": {"sample": [0.2, 0.9]}})
    with pytest.warns(UserWarning, match="the schedule of .* does not advance: it is still at step 0"):
        example.model.train()(**example.batch)
