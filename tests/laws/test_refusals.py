"""What the library refuses: never a silent soft model, always a message that names the remedy."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
import transformers
from cases import ESTIMATORS, PLACES, SCORERS, Case, all_sites, hard, refusal, stock
from examples import TEXT_SIZES
from torch import nn

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError, registry


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p.architecture}-{p.group}-{p.causal}")
def test_a_scorer_is_served_or_refused_by_name(place, scorer):
    case = Case(place, place.heads[0], scorer)
    message = refusal(place, scorer)
    if message is None:
        example = hard(case)
        assert set(hf_hardattn.selectors(example.model)) == {
            s for s in all_sites(example.model) if s.startswith(place.group)
        }
    else:
        with pytest.raises(HardAttentionError, match=message.replace(".*", r"[.\w]*")):
            hard(case)


@pytest.mark.parametrize(
    "place", [p for p in PLACES if p.kind in ("tokens", "inputs")], ids=lambda p: f"{p.architecture}-{p.group}"
)
def test_a_choice_per_head_is_refused_where_whole_tokens_are_dropped(place):
    with pytest.raises(
        HardAttentionError, match=r"per_head=True selects per head; .* Use it at a 'self' or 'cross' site"
    ):
        hard(Case(place, place.heads[0]), per_head=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gathered_training_is_refused_to_pathwise_estimators(estimator):
    member = registry.load("estimators", estimator)
    if member.trains_gathered or estimator == "soft":
        hard(Case(PLACES[-1], PLACES[-1].heads[0], estimator=estimator), execution="gathered")
        return
    with pytest.raises(
        HardAttentionError, match=f"leaves estimator '{estimator}' without a gradient.*execution='auto'"
    ):
        hard(Case(PLACES[-1], PLACES[-1].heads[0], estimator=estimator), execution="gathered")


def test_a_refused_configuration_leaves_the_model_as_it_was():
    model = stock("vit", "ViTForImageClassification").model
    classes = [type(m) for m in model.modules()]
    with pytest.raises(HardAttentionError):
        hf_hardattn.apply(model, {"sites": ["vision.tokens.*"], "scorer": "query_key"})
    assert [type(m) for m in model.modules()] == classes and model.config.hard_attention is None


BAD = [
    ({"scorer": "linaer"}, "unknown scorer 'linaer'; known: .*'linear'.* Did you mean 'linear'\\?"),
    ({"estimator": "simpel"}, "unknown estimator 'simpel'; known: .* Did you mean 'simple'\\?"),
    ({"baseline": "nothing"}, "unknown baseline 'nothing'; known: 'learned', 'leave_one_out'"),
    ({"budget": 0}, "budget=0 is out of range at 'the top level'; an int budget is the number of positions"),
    (
        {"budget": 1.3},
        r"budget=1.3 is out of range at 'the top level'; a float budget is the ratio to KEEP, in \(0, 1\]",
    ),
    ({"budget": -0.5}, "budget=-0.5 is out of range"),
    ({"budget": True}, "budget=True is not a budget"),
    ({"budget": None}, "budget=None is not a budget"),
    ({"budget": "most"}, "budget='most' is not a budget"),
    ({"budget": "top_p:1.5"}, r"budget='top_p:1.5' is out of range.*must be in \(0, 1\)"),
    ({"temperature": 0}, "temperature=0 is out of range.*it must stay > 0"),
    ({"entropy_weight": -1}, "entropy_weight=-1 is out of range .*a loss weight is a number >= 0"),
    ({"execution": "fast"}, "unknown execution 'fast'.*known: 'auto', 'gathered', 'masked'"),
    (
        {"scorer": "mlp", "scorer_options": {"hiden": 3}},
        "unknown option of scorer 'mlp': 'hiden'.* Did you mean 'hidden'",
    ),
    ({"scorer_options": 3}, "scorer_options=3 is not a dict"),
    ({"sites": []}, "sites is empty"),
    (
        {"sites": {"vision.tokens.1": {"buget": 0.5}}},
        "unknown site field 'buget' at 'vision.tokens.1'; .* Did you mean 'budget'",
    ),
    ({"sites": {"vision.tokens.1": {"budget": 1.3}}}, "budget=1.3 is out of range at 'vision.tokens.1'"),
    ({"temperature": {"start": 1.0, "end": 0.1}}, "is not a schedule at 'the top level, temperature'"),
    ({"schema_version": 99}, "schema_version=99 is newer than this hf_hardattn supports"),
    ({"sights": ["vision.inputs"]}, "unknown key of hard_attention: 'sights'; known: .* Did you mean 'sites'"),
    ({"schema_version": 99, "from_the_future": 1}, "schema_version=99 is newer.*pip install -U hf-hardattn"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_a_bad_configuration_names_what_is_wrong(data, message):
    with pytest.raises(HardAttentionError, match=message):
        HardAttentionConfig.from_dict(data)
    model = stock("vit", "ViTForImageClassification").model
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.apply(model, data)
    assert not hf_hardattn.selectors(model)


@pytest.mark.parametrize(
    ("architecture", "head", "pattern"),
    [
        ("vit", "ViTModel", "decoder.cross.*"),
        ("t5", "T5ForConditionalGeneration", "vision.*"),
        ("vit", "ViTModel", "vision.tokens.9"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_the_sites(architecture, head, pattern):
    model = stock(architecture, head).model
    first = next(iter(all_sites(model)))
    with pytest.raises(
        HardAttentionError, match=re.escape(f"no site matches '{pattern}' in {head}; it has: '{first}'")
    ):
        hf_hardattn.apply(model, {"sites": [pattern]})


def test_an_unsupported_model_is_refused():
    with pytest.raises(HardAttentionError, match="Linear has no config, which holds the settings of hard attention"):
        hf_hardattn.apply(nn.Linear(2, 2), {})


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "XLMRobertaModel", "BertLMHeadModel"])
def test_an_encoder_that_is_a_decoder_is_refused_with_the_setting_that_makes_it_one(name):
    cls = getattr(transformers, name)
    sizes = dict(TEXT_SIZES, num_hidden_layers=1, is_decoder=True)
    with pytest.raises(
        HardAttentionError, match=f"{name} is not supported.* supports it as an encoder, with is_decoder=False"
    ):
        hf_hardattn.apply(cls(cls.config_class(**sizes)), {"budget": 0.5})
    with pytest.raises(HardAttentionError, match=f"{name}, so hard attention cannot be applied.* is_decoder=False"):
        cls(cls.config_class(**sizes, hard_attention={"budget": 0.5}))


def mapped(model, pixels):
    weights = dict(model.named_parameters())
    return torch.func.vmap(lambda one: torch.func.functional_call(model, weights, (one[None],)).logits[0])(pixels)


WITHOUT_NUMBERS = {
    "torch.jit.trace": lambda model, pixels: torch.jit.trace(model, (pixels,), strict=False, check_trace=False)(pixels),
    "torch.vmap": mapped,
    "the device 'meta'": lambda model, pixels: copy.deepcopy(model).to("meta")(pixels.to("meta")).logits,
}


@pytest.mark.filterwarnings("ignore")  # tracing and vmap warn of what they do
@pytest.mark.parametrize("site", ["vision.inputs", "vision.tokens.1", "vision.self.0"])
@pytest.mark.parametrize("where", WITHOUT_NUMBERS)
@torch.no_grad()
def test_a_number_that_cannot_be_read_is_refused_and_a_fixed_one_need_not_be(where, site):
    """A trace would keep as many positions of every input as of the one that it was made with."""
    example = stock("vit", "ViTForImageClassification")
    call = partial(WITHOUT_NUMBERS[where], example.model, example.batch["pixel_values"])
    for budget in ("threshold:0.5", "top_p:0.6"):
        hf_hardattn.apply(example.model, {"sites": [site], "budget": budget})
        with pytest.raises(HardAttentionError, match=f"'{site}' reads how many positions are kept, (under|on) {where}"):
            call()
    hf_hardattn.apply(example.model, {"sites": [site], "budget": 3})
    call()


def test_recording_and_replaying_need_sites():
    example = stock("vit", "ViTModel")
    with (
        pytest.raises(HardAttentionError, match="ViTModel has no hard-attention sites to record"),
        hf_hardattn.record(example.model),
    ):
        pass
    hf_hardattn.apply(example.model, {"sites": ["vision.inputs"]})
    with pytest.raises(HardAttentionError, match="unknown site 'vision.self.0' at 'ViTModel'; known: 'vision.inputs'"):
        with hf_hardattn.replay(example.model, {"vision.self.0": example.batch["pixel_values"] > 0}):
            pass
    with hf_hardattn.record(example.model) as selections:
        example.model(**example.batch)
    with pytest.raises(
        HardAttentionError, match="unknown recorded site 'vision.outputs'.* Did you mean 'vision.inputs'"
    ):
        selections["vision.outputs"]
    with pytest.raises(HardAttentionError, match="the recording holds fewer selections at 'vision.inputs'"):
        with hf_hardattn.replay(example.model, selections):
            example.model(**example.batch)
            example.model(**example.batch)
