"""Diagnostics: gradients of estimators against the exact one, and detectors of collapsed selectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import harden, stock, tensors

import hf_hardattn
from hf_hardattn import HardAttentionError, registry
from hf_hardattn.estimators import Estimator
from hf_hardattn.inspection.diagnosis import _is_suspect
from hf_hardattn.inspection.random_control import beside_random, drawn_like


def vit(**config):
    example = stock("vit", "ViTForImageClassification", image_size=8)
    example.batch = {
        "pixel_values": torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(3)),
        **{"labels": torch.tensor([4, 0, 2])},
    }
    harden(example.model, {"sites": ["vision.inputs"], "scorer": "linear", "budget": 2, **config})
    return example


@pytest.fixture(scope="module")
def diagnosis():
    example = vit()
    names = ["simple", "reinforce", "rloo", "straight_through", "distil", {"estimator": "simple", "temperature": 2.0}]
    before = {name: value.clone() for name, value in example.model.state_dict().items()}
    found = hf_hardattn.diagnose(example.model, example.batch, names, draws=24)
    assert all(torch.equal(value, before[name]) for name, value in example.model.state_dict().items())
    return found


def test_diagnosis_knows_the_exact_gradient(diagnosis):
    rows = {row.estimator: row for row in diagnosis.rows}
    assert list(rows) == ["simple", "reinforce", "rloo", "straight_through", "distil", "simple, temperature=2.0"]
    assert all(row.failed is None and row.bias is not None and row.error >= -1e-6 for row in diagnosis.rows)
    assert rows["rloo"].relative_sd < rows["reinforce"].relative_sd
    assert rows["simple"].error < rows["reinforce"].error
    assert rows["straight_through"].relative_sd < 1e-6 and rows["straight_through"].distinct == 1
    assert rows["reinforce"].distinct > 1 and not rows["reinforce"].biased
    assert rows["rloo"].cosine_to_rloo > 0.8
    assert set(diagnosis.to_dict()) == {"draws", "rows", "collapses", "noise"} and "relative_sd" in str(diagnosis)


def test_diagnosis_says_what_to_train_with(diagnosis):
    text, best = str(diagnosis), min((row for row in diagnosis.rows if not row.suspect), key=lambda row: row.error)
    assert "relative_sd: noise of one step's gradient" in text
    assert f"vision.inputs: '{best.estimator}' has the smallest error per step, {best.error:.2f}" in text


class Opposite(Estimator):
    """The gradient of SIMPLE, turned round."""

    biased = True
    needs = ("gates",)
    source = "none"

    def sample(self, scores, k, valid, *, slots, sampling):
        choice = registry.load("estimators", "simple")().sample(scores, k, valid, slots=slots, sampling=sampling)
        choice.gates = 2 * choice.gates.detach() - choice.gates
        return choice


def test_an_estimator_that_points_elsewhere_is_suspect(monkeypatch):
    monkeypatch.setitem(registry._registered, ("estimators", "opposite"), Opposite)
    example = vit()
    found = hf_hardattn.diagnose(example.model, example.batch, ["simple", "opposite"], draws=24)
    assert [row.suspect for row in found.rows] == [False, True]
    assert "suspect: vision.inputs opposite: its mean gradient points in another direction" in str(found)
    noisy = replace(found.rows[1], bias=None)
    assert _is_suspect(noisy, noise=0.1) and not _is_suspect(noisy, noise=2.0)


def test_a_selection_is_compared_with_a_random_one():
    example = vit(budget=1)
    pixels = 4 * torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    example.batch = {"pixel_values": pixels, "labels": example.model.eval()(pixels).logits.argmax(-1)}
    found = beside_random(example.model, example.batch)
    assert 0 < found["changed_by_random"] <= 1 and found["loss_over_random"] > 0
    assert beside_random(example.model, example.batch) == found  # nothing but the seed decides
    hf_hardattn.set_budget(example.model, 1.0)
    same = beside_random(example.model, example.batch)
    assert set(same.values()) <= {0.0}


def test_random_selections_are_of_equal_size():
    example = vit(budget=2)
    with hf_hardattn.record(example.model.eval()) as selections:
        example.model(**example.batch)
    drawn = [drawn_like(selections[0], torch.Generator().manual_seed(seed)).mask for seed in range(20)]
    assert all(torch.equal(mask.sum(-1), selections[0].mask.sum(-1)) and mask[..., 0].all() for mask in drawn)
    assert torch.stack(drawn).any(0).all()  # every patch is drawn now and then


def test_more_samples_come_closer_to_the_exact_gradient():
    example = vit()
    few, many = (hf_hardattn.diagnose(example.model, example.batch, ["rloo"], draws=d).rows[0].bias for d in (2, 64))
    assert many < few and many < 0.1


def test_without_enumeration_rloo_is_the_reference():
    example = vit()
    row = hf_hardattn.diagnose(example.model, example.batch, ["simple"], draws=4, limit=3).rows[0]
    assert row.bias is None and row.error is not None and row.cosine_to_rloo is not None


def test_an_estimator_that_cannot_run_is_reported_not_hidden():
    example = vit()
    found = hf_hardattn.diagnose(
        example.model, example.batch, [{"estimator": "marginal", "estimator_options": {"limit": 2}}], draws=2
    )
    assert "selections of 2 among 4 positions" in found.rows[0].failed and "failed: vision.inputs" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, b: ((m, b), {"draws": 1}), "draws=1 is out of range"),
        (lambda m, b: ((hf_hardattn.remove(m), b), {}), "no site with a learned scorer"),
        (lambda m, b: ((m, {"pixel_values": b["pixel_values"]}), {"estimators": ["simple"]}), "returned no loss"),
    ],
)
def test_what_diagnose_refuses(change, message):
    example = vit()
    args, options = change(example.model, example.batch)
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.diagnose(*args, **options)


# ---------------------------------------------------------------- collapse


def kinds(example):
    return {finding.kind for finding in hf_hardattn.find_collapse(example.model, example.batch)}


def test_a_healthy_selector_raises_nothing():
    example = vit()
    before = tensors(example.model.eval()(**example.batch))
    assert kinds(example) == set()
    assert all(torch.equal(value, before[name]) for name, value in tensors(example.model(**example.batch)).items())


def test_all_kept_and_nothing_kept():
    assert kinds(vit(budget=1.0)) >= {"keeps_all"}
    example = vit(budget="threshold:0.5")
    (selector,) = hf_hardattn.selectors(example.model).values()
    with torch.no_grad():
        selector.scorer.bias.fill_(100.0)
    assert "keeps_all" in kinds(example)
    with torch.no_grad():
        selector.scorer.bias.fill_(-100.0)
    assert "keeps_nothing" in kinds(example)


def test_position_constant():
    assert kinds(vit(scorer="first")) == {"position_constant"}
    example = vit(scorer="linear")
    (selector,) = hf_hardattn.selectors(example.model).values()
    with torch.no_grad():  # all scores equal: ties go to the lower index
        selector.scorer.weight.zero_()
    assert kinds(example) == {"position_constant"}


def test_input_independent():
    """Scores that hardly depend on the input, though single choices still differ."""
    example = vit(scorer="first")
    (selector,) = hf_hardattn.selectors(example.model).values()
    made = selector.scorer.keys
    noise = 0.01 * torch.randn(3, 1, 5, 1, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([9.0, 3.0, 1.0, 0.999, 0.998])[None, None, :, None]
    selector.scorer.keys = lambda *args: 0 * made(*args) + levels + noise
    assert kinds(example) == {"input_independent"}


def test_dead_site():
    example = vit(estimator="straight_through")
    (selector,) = hf_hardattn.selectors(example.model).values()
    with torch.no_grad():
        selector.scorer.weight.mul_(1e9)
    assert "dead" in kinds(example)
    selector.config = hf_hardattn.SiteConfig(**{**vars(selector.config), "backward_temperature": "adaptive"})
    assert "dead" not in kinds(example)


def test_diagnose_warns_with_the_remedy():
    example = vit(scorer="linear", budget=1.0)
    with pytest.warns(UserWarning, match="keeps every position that it may drop.*Lower its budget"):
        hf_hardattn.diagnose(example.model, example.batch, ["simple"], draws=2)


@pytest.mark.parametrize("better", [False, True], ids=["chance is better", "chance is worse"])
def test_a_choice_that_serves_worse_than_chance_is_named(better):
    """Labels are those that a choice at random would make likelier, or less likely, than the model's own choice does."""
    example = stock("vit", "ViTForImageClassification")
    harden(example.model, {"sites": ["vision.inputs"], "budget": 3})
    generator = torch.Generator().manual_seed(0)
    example.batch = {"pixel_values": torch.randn(24, 2, 12, 12, generator=generator)}
    with torch.no_grad():
        own, chance = example.model(**example.batch).logits.log_softmax(-1), 0.0
        for _ in range(30):
            mask = torch.rand(24, 10, generator=generator).argsort(-1) < 4
            mask[:, 0] = True
            with hf_hardattn.replay(example.model, {"vision.inputs": mask}):
                chance = chance + example.model(**example.batch).logits.log_softmax(-1) / 30
    example.batch["labels"] = ((own - chance) if better else (chance - own)).argmax(-1)
    findings = [f for f in hf_hardattn.find_collapse(example.model, example.batch) if f.kind == "worse_than_random"]
    assert [str(f)[:59] for f in findings] == (
        [] if better else ["'vision.inputs' keeps positions that are worse than random "]
    )


def test_verify_says_what_the_certificate_does_not_cover():
    """The scorer read what was dropped: free to choose again it may keep other positions, and one that reads no content does not."""
    for scorer, overlap in (("mlp", None), ("first", 1.0)):
        example = vit(scorer=scorer)
        report = hf_hardattn.verify(example.model, example.batch)
        (site,) = report.sites
        assert site.certified and (site.overlap < 1 if overlap is None else site.overlap == overlap)
        assert (site.answers_changed > 0) == (overlap is None)
        assert (
            f"when the model selects again after such a replacement, which no certificate covers, the old and the new selection overlap by {site.overlap:.2f}"
            in str(report)
        )
        assert report.to_dict()["sites"][0]["overlap"] == site.overlap
