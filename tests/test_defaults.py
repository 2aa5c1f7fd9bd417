"""What a configuration does where it names nothing: the scorer of a site, and a budget that falls in training."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from examples import build

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError
from hf_hardattn.budget import Budget


def hard(family: str, head: str, **config):
    example = build(family, head)
    hf_hardattn.apply(example.model, config)
    return example


@pytest.mark.parametrize(
    ("family", "head", "site", "scorer"),
    [
        ("vit", "ViTForImageClassification", "vision.inputs", "conv"),
        ("vit", "ViTForImageClassification", "vision.tokens.1", "linear"),
        ("vit", "ViTForImageClassification", "vision.self.1", "linear"),
        ("bert", "BertForSequenceClassification", "text.inputs", "mlp"),
        ("t5", "T5ForConditionalGeneration", "encoder.inputs", "mlp"),
        ("t5", "T5ForConditionalGeneration", "decoder.cross.0", "linear"),
    ],
)
def test_the_scorer_suits_the_kind_of_site(family, head, site, scorer):
    model = hard(family, head, sites=[site]).model
    assert hf_hardattn.selectors(model)[site].config.scorer == scorer
    assert model.config.hard_attention["scorer"] == scorer  # a name: what "auto" means later is nothing to a checkpoint


def test_sites_that_take_different_scorers_are_written_one_by_one():
    sites = {"vision.*": {"budget": 0.5}, "vision.tokens.*": 2, "vision.tokens.1": {"scorer": "key_norm"}}
    model = hard("vit", "ViTForImageClassification", sites=sites, estimator="straight_through").model
    saved = json.loads(json.dumps(model.config.hard_attention))
    assert saved["scorer"] == "conv"
    assert saved["sites"]["vision.tokens.0"].items() >= {"budget": {"count": 2}, "scorer": "linear"}.items()
    scorers = {site: selector.config.scorer for site, selector in hf_hardattn.selectors(model).items()}
    assert scorers["vision.inputs"] == "conv" and scorers["vision.tokens.1"] == "key_norm"
    again = HardAttentionConfig.from_dict(saved).resolve(scorers, [], "ViT")
    assert {site: config.to_dict() for site, config in again.items()} == {
        site: selector.config.to_dict() for site, selector in hf_hardattn.selectors(model).items()
    }


def test_one_position_stays_apart_from_all_of_them_where_sites_are_written_one_by_one():
    sites = {"vision.inputs": 1, "vision.tokens.0": 1.0}
    model = hard("vit", "ViTForImageClassification", sites=sites, budget=1.0).model
    budgets = {site: selector.config.budget for site, selector in hf_hardattn.selectors(model).items()}
    assert repr(budgets) == "{'vision.inputs': 1, 'vision.tokens.0': 1.0}"


def test_reload_has_the_same_scorers(tmp_path):
    example = hard("blip", "BlipForConditionalGeneration", sites=["vision.inputs", "text.cross.*"], budget=0.5)
    example.model.save_pretrained(tmp_path)
    again = type(example.model).from_pretrained(tmp_path)
    assert again.config.hard_attention == example.model.config.hard_attention
    with torch.no_grad():
        assert torch.equal(example.model.eval()(**example.batch).logits, again(**example.batch).logits)


def test_schema_2_keeps_the_defaults_of_its_time():
    old = HardAttentionConfig.from_dict({"schema_version": 2, "sites": ["vision.inputs"]})
    assert (old.scorer, old.anneal) == ("linear", 0)
    assert HardAttentionConfig.from_dict({"schema_version": 2, "recipe": "robust"}).anneal == 0.4


def kept(example, step):
    """Positions that a training step of 10 keeps, CLS left out."""
    hf_hardattn.set_step(example.model, step, 10)
    example.model.train()
    with hf_hardattn.record(example.model) as selections:
        example.model(**example.batch)
    return int(selections["vision.inputs"][0].mask.sum(-1).max()) - 1


@pytest.mark.parametrize("budget", [0.34, 4])
def test_a_budget_falls_from_everything(budget):
    example = hard("vit", "ViTForImageClassification", sites=["vision.inputs"], budget=budget)  # of 9 patches
    falling = [kept(example, step) for step in range(6)]
    assert falling[0] == 9 and falling[4:] == [4, 4] and sorted(falling, reverse=True) == falling
    assert 4 < falling[2] < 9
    example.model.eval()
    with hf_hardattn.record(example.model) as selections:
        example.model(**example.batch)
    hf_hardattn.set_step(example.model, 0, 10)
    assert int(selections["vision.inputs"][0].mask.sum(-1).max()) - 1 == 4  # evaluation never keeps more


@pytest.mark.parametrize("changes", [{"anneal": 0}, {"estimator": "rloo"}, {"budget": "threshold:0.9"}])
def test_what_does_not_fall(changes):
    example = hard("vit", "ViTForImageClassification", **{"sites": ["vision.inputs"], "budget": 4, **changes})
    assert kept(example, 0) <= 4


def test_an_annealed_count_and_ratio_serve_rows_of_different_length():
    scores, valid = torch.zeros(2, 10), torch.arange(10) < torch.tensor([[10], [4]])
    assert Budget("count", 2, least=0.5).count(scores, valid).tolist() == [5, 2]
    assert Budget("ratio", 0.1, least=0.5).count(scores, valid).tolist() == [5, 2]
    assert [Budget("count", 7, least=0.5).slots(n) for n in (10, 4)] == [7, 4]


def test_a_training_of_unknown_length_is_told_once():
    example = hard("vit", "ViTForImageClassification", sites=["vision.inputs", "vision.tokens.0"], budget=0.4)
    example.model.train()
    with pytest.warns(
        UserWarning, match="the budget of 'vision.inputs', 'vision.tokens.0' is not annealed, because the number of"
    ):
        example.model(**example.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example.model(**example.batch)
    example = hard("vit", "ViTForImageClassification", sites=["vision.inputs"], budget=0.4, anneal=0.5)
    example.model.train()
    hf_hardattn.set_step(example.model, 1)
    with pytest.raises(
        HardAttentionError, match="is a share of the training, but the length of the training is not known"
    ):
        example.model(**example.batch)
