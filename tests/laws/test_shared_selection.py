"""``share_selection``: one choice for all layers of a tower. Everything the laws ask of a site, and nothing else than replaying it."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import HEADS, can_generate, close, harden, has_loss, run, stock, train_loss
from rounding import SOME, assert_rounded

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.config import HardAttentionConfig
from hf_hardattn.modeling.plan import FOLLOWS
from hf_hardattn.models import family_of


def patterns(model):
    """One glob a tower and kind whose layers can share: bidirectional ``self``, and ``cross``."""
    towers = family_of(model).towers(model)
    return [
        f"{name}.{kind}.*"
        for name, tower in towers.items()
        for kind in tower.kinds
        if kind == "cross" or kind == "self" and not tower.causal
    ]


PLACES = [(a, head, pattern) for a, head in HEADS for pattern in patterns(stock(a, head).model)]


def shared(architecture, head, pattern, padded=True, **config):
    example = stock(architecture, head, padded)
    harden(example.model, {"sites": [pattern], "budget": 0.4, "share_selection": True, **config})
    return example


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"budget": "top_p:0.6"}, {"budget": 1.0}], ids=str)
@pytest.mark.parametrize(("architecture", "head", "pattern"), PLACES)
def test_sharing_is_replaying_the_first_layers_choice(architecture, head, pattern, options):
    """The oracle: the same model whose every layer is given that choice, in either execution."""
    padded = options != {"budget": 1.0}  # stock BLIP attends to padding of the question, a selector never
    example = shared(architecture, head, pattern, padded, **options)
    (selector,) = hf_hardattn.selectors(example.model).values()
    with hf_hardattn.record(example.model) as selections:
        found = run(example)
    assert selections.sites == [selector.site]
    apart = stock(architecture, head, padded)
    harden(apart.model, {"sites": [pattern], "budget": 0.4, **options})
    mask = selections[0].mask
    with hf_hardattn.replay(apart.model, {site: mask for site in hf_hardattn.selectors(apart.model)}):
        expected = run(apart)
    close(found, expected)
    with hf_hardattn.execution(example.model, "masked"):
        close(run(example), expected)
    plain = run(stock(architecture, head, padded))
    if not padded:
        close(found, plain)
    with hf_hardattn.soft(example.model):
        close(run(example), plain)
    hf_hardattn.remove(example.model)
    close(run(example), plain, 0)


@pytest.mark.parametrize(("estimator", "use_reentrant"), [("simple", True), ("reinforce", False)])
@pytest.mark.parametrize(("architecture", "head", "pattern"), [p for p in PLACES if has_loss(stock(*p[:2]))])
def test_checkpointing_changes_no_gradient(architecture, head, pattern, estimator, use_reentrant):
    example = shared(architecture, head, pattern, estimator=estimator, baseline="leave_one_out")
    kept = copy.deepcopy(example)
    kept.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for made in (example, kept):
        train_loss(made).backward()
    expected = dict(example.model.named_parameters())
    (selector,) = hf_hardattn.selectors(example.model).values()
    assert all(p.grad is not None for p in selector.scorer.parameters())
    for name, parameter in kept.model.named_parameters():
        gradient = expected[name].grad
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            assert_rounded(parameter.grad, gradient, 3 * SOME, name)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("architecture", "head"), [h for h in HEADS if can_generate(*h)])
def test_generation_with_a_cache(architecture, head, padded, options):
    if "cache_implementation" in options:
        if architecture != "t5":
            return  # stock BLIP has no static cache
        options = {**options, "disable_compile": True}
    for pattern in patterns(stock(architecture, head).model):
        example = shared(architecture, head, pattern, padded, budget=3)
        inputs = {k: v for k, v in example.batch.items() if k not in ("labels", "decoder_input_ids")}
        common = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5)
        cached = example.model.generate(**inputs, **common, **options)
        beams = {name: value for name, value in options.items() if name == "num_beams"}
        assert torch.equal(cached, example.model.generate(**inputs, **common, **beams, use_cache=False))


def test_only_the_first_layer_holds_weights_and_the_config_brings_it_back(tmp_path):
    example = shared("t5", "T5ForConditionalGeneration", "encoder.self.*")
    keys = [key for key in example.model.state_dict() if "selector" in key]
    assert keys and all(".block.0." in key for key in keys)
    assert "encoder.self.0 (and 2 more)" in hf_hardattn.status(example.model)
    example.model.save_pretrained(tmp_path)
    again = type(example.model).from_pretrained(tmp_path).eval()
    assert again.config.hard_attention["share_selection"] is True
    close(run(type(example)(again, example.batch)), run(example), 0)


def test_a_site_that_drops_rows_starts_a_new_choice():
    """What there is to choose from changes there; so do other configurations and layers that do not share."""
    example = stock("vit", "ViTForImageClassification")
    sites = {"vision.self.*": {"share_selection": True}, "vision.tokens.0": {"budget": 0.8}}
    harden(example.model, {"sites": sites, "budget": 0.6})
    assert list(hf_hardattn.selectors(example.model)) == ["vision.self.0", "vision.tokens.0", "vision.self.1"]
    with hf_hardattn.execution(example.model, "masked"):
        masked = run(example)
    close(run(example), masked)
    sites = {"vision.self.*": {"share_selection": True}, "vision.self.1": {"budget": 0.9}}
    harden(example.model, {"sites": sites, "budget": 0.6})
    assert list(hf_hardattn.selectors(example.model)) == ["vision.self.0", "vision.self.1"]
    assert example.model.vit.layers[2].attention.__dict__[FOLLOWS] == "vision.self.0"


@pytest.mark.parametrize(
    ("head", "pattern", "options", "message"),
    [
        (("vit", "ViTModel"), "vision.tokens.0", {}, "share_selection=True at 'vision.tokens.0', which drops rows"),
        (
            ("t5", "T5Model"),
            "decoder.self.*",
            {},
            "share_selection=True at 'decoder.self.0', which selects for each query",
        ),
        (
            ("t5", "T5Model"),
            "encoder.self.*",
            {"scorer": "query_key"},
            "only 'self' or 'cross' sites that make one selection",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(head, pattern, options, message):
    with pytest.raises(HardAttentionError, match=message):
        harden(stock(*head).model, {"sites": [pattern], "share_selection": True, **options})


def test_share_selection_is_true_or_false():
    with pytest.raises(HardAttentionError, match="share_selection=2 is not a valid value at 'vision.self"):
        HardAttentionConfig(sites={"vision.self.*": {"share_selection": 2}})
