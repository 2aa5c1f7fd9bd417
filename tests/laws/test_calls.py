"""Law 14, of calls: what a call knows reaches every tower of its model and no other, and nothing of it is left when it ends."""

from __future__ import annotations

import copy
import inspect

import decoders
import pytest
import torch
from cases import HEADS, Example, close, harden, run, stock, tensors, train_loss
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, ViTForImageClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_hardattn
from hf_hardattn.models import family_of

CONFIG = {"sites": ["*"], "budget": 2, "baseline": "none"}
TRAINED = [
    ("bert", "BertForSequenceClassification"),
    ("vit", "ViTForImageClassification"),
    ("siglip", "SiglipForImageClassification"),
    ("t5", "T5ForConditionalGeneration"),
    ("bart", "BartForConditionalGeneration"),
    ("blip", "BlipForConditionalGeneration"),
    ("gru", "GruForConditionalGeneration"),
]


def swallowing(model: nn.Module) -> nn.Module:
    """Make the model one of a subclass that takes any keyword and hands on only those that it knows."""
    cls = type(model)
    known = {n for n, p in inspect.signature(cls.forward).parameters.items() if p.kind is not p.VAR_KEYWORD}

    def forward(self, *args, **kwargs):
        return cls.forward(self, *args, **{name: value for name, value in kwargs.items() if name in known})

    forward.__signature__ = inspect.signature(cls.forward)
    model.__class__ = type(cls.__name__, (cls,), {"forward": forward})
    return model


# -------------------------------------------------------------------------------------------- a head that hands no keywords on


@pytest.mark.parametrize("estimator", ["reinforce", "hard_concrete"])
@pytest.mark.parametrize(("architecture", "head"), TRAINED)
def test_a_head_that_hands_no_keywords_on_trains_as_one_that_does(architecture, head, estimator):
    losses, gradients = [], []
    for change in (swallowing, lambda model: model):
        example = stock(architecture, head)
        harden(change(example.model), {**CONFIG, "estimator": estimator})
        losses.append(train_loss(example))
        losses[-1].backward()
        gradients.append([p.grad for s in hf_hardattn.selectors(example.model).values() for p in s.parameters()])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert any(gradient is not None for gradient in gradients[0])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [2, "threshold:0.5"])
@pytest.mark.parametrize(("architecture", "head"), [pair for pair in TRAINED if pair[0] != "siglip"])
def test_a_head_that_hands_no_keywords_on_computes_as_one_that_does(architecture, head, budget, padded):
    """A decoder then knows what the encoder kept: masked and gathered, with and without a mask."""
    example, mine = (stock(architecture, head, padded) for _ in range(2))
    if not padded:
        for each in (example, mine):
            each.batch.pop("attention_mask", None)
    harden(example.model, {**CONFIG, "budget": budget})
    harden(swallowing(mine.model), {**CONFIG, "budget": budget})
    for mode in ("gathered", "masked"):
        with hf_hardattn.execution(example.model, mode), hf_hardattn.execution(mine.model, mode):
            close(run(mine), run(example), 0)


@pytest.mark.parametrize("site", ["decoder.inputs", "decoder.tokens.0", "decoder.self.1"])
def test_a_decoder_that_hands_no_keywords_on_leaves_the_answer_whole(site):
    model = decoders.harden(decoders.stock("llama"), {"sites": [site], "budget": 0.5})
    mine = decoders.harden(swallowing(decoders.stock("llama")), {"sites": [site], "budget": 0.5})
    inputs = decoders.prompts()
    labels = inputs["input_ids"].clone()
    labels[:, :8] = -100
    with torch.no_grad(), hf_hardattn.record(mine) as selections:
        found = mine(**inputs, labels=labels)
    assert decoders.kept(selections)[site][:, 8:].all()
    with torch.no_grad():
        assert torch.equal(found.logits, model(**inputs, labels=labels).logits)


class OwnHead(BertPreTrainedModel):
    """The commonest head of one's own."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.out = BertModel(config), nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.out(self.bert(input_ids=input_ids).last_hidden_state[:, 0])
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "grpo", "cropr", "distil", "hard_concrete"])
def test_an_own_head_trains_every_parameter_of_its_selectors(estimator):
    sizes = dict(vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37)
    model = OwnHead(BertConfig(**sizes, num_labels=3))
    hf_hardattn.apply(model, {"sites": ["text.tokens.0"], "budget": 3, "estimator": estimator, "anneal": 0})
    model.train()(input_ids=torch.randint(2, 53, (3, 11)), labels=torch.arange(3)).loss.backward()
    assert all(p.grad is not None for s in hf_hardattn.selectors(model).values() for p in s.parameters())


# ------------------------------------------------------------------------------------------------------------ calls inside calls


@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("inner", ["siglip", "t5", "its copy", "its copy's towers"])
@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize(("architecture", "head"), [("siglip", "SiglipVisionModel"), TRAINED[3]])
def test_another_model_called_inside_a_call_changes_nothing(architecture, head, swallows, inner, end):
    """In front of its first linear map, or of its last; of the pooling, if it has one."""
    example = stock(architecture, head)
    harden(swallowing(example.model) if swallows else example.model, CONFIG)
    if inner.startswith("its copy"):
        other = Example(copy.deepcopy(example.model), example.batch)
    else:
        other = stock(inner, dict(reversed(HEADS))[inner])
        harden(other.model, {"sites": ["*.tokens.0"], "budget": 3})
    call = run_towers if inner == "its copy's towers" else run
    alone, inside = call(other), []
    kinds = {type(part): part for part in example.model.modules()}
    maps = [part for part in example.model.modules() if type(part) is nn.Linear]
    place = maps[0] if end == "first" else kinds.get(nn.MultiheadAttention, maps[-1])
    for mode in ("gathered", "masked"):
        with hf_hardattn.execution(example.model, mode):
            expected = run(example)
            hook = place.register_forward_pre_hook(lambda *_: inside.append(call(other)))
            close(run(example), expected, 0)
            hook.remove()
    assert inside
    for found in inside:
        close(found, alone, 0)


def run_towers(example):
    """The outputs of the towers that read the model's input, each called on its own."""
    towers = [t for t in family_of(example.model).towers(example.model).values() if t.source is None]
    with torch.no_grad():
        return tensors([tower.module(example.batch[tower.spec.inputs]) for tower in towers])


@pytest.mark.parametrize(("architecture", "head"), TRAINED)
def test_a_tower_that_replaced_another_one_belongs_to_the_call(architecture, head):
    """A copy, in a model that hands no keywords on."""
    losses = []
    for change in (copy.deepcopy, lambda tower: tower):
        example = stock(architecture, head)
        harden(swallowing(example.model), {**CONFIG, "estimator": "hard_concrete"})
        towers = [tower.module for tower in family_of(example.model).towers(example.model).values()]
        for path, part in [*example.model.named_modules()]:
            if part in towers:
                example.model.set_submodule(path, change(part))
        losses.append(train_loss(example))
        losses[-1].backward()
        assert all(p.grad is not None for s in hf_hardattn.selectors(example.model).values() for p in s.parameters())
    assert torch.equal(*losses)


class Twice(ViTForImageClassification):
    """A model that calls itself."""

    def forward(self, pixel_values, labels=None, once=False, **kwargs):
        if not once:
            self(pixel_values, labels=labels, once=True)
        return super().forward(pixel_values, labels=labels, **kwargs)


@pytest.mark.parametrize("estimator", ["reinforce", "simple"])
def test_a_model_may_call_itself(estimator):
    plain, example = (stock("vit", "ViTForImageClassification") for _ in range(2))
    Twice.__name__ = "ViTForImageClassification"  # the loss function is found by the name
    example.model.__class__ = Twice
    for each in (plain, example):
        harden(each.model, {**CONFIG, "estimator": estimator, "estimator_options": {}})
    close(run(example), run(plain), 0)
    with hf_hardattn.record(example.model) as selections:
        train_loss(example).backward()
    sites = hf_hardattn.selectors(example.model)
    assert len(selections) == 2 * len(sites)
    assert all(p.grad is not None for s in sites.values() for p in s.scorer.parameters())


# --------------------------------------------------------------------------------------------------------------- calls that fail


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize(("architecture", "head"), TRAINED[:-1])
def test_a_call_that_fails_leaves_its_towers_free(architecture, head, swallows, error):
    """A KeyboardInterrupt ends a training step in a notebook; what comes next is recorded, or soft, as if nothing had been."""
    example = stock(architecture, head)
    harden(swallowing(example.model) if swallows else example.model, {"sites": ["*"], "budget": 2})
    expected = run(example)
    last = [module for module in example.model.modules() if isinstance(module, nn.Linear)][-1]

    def fail(*_):
        raise error

    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(error):
        example.model.train()(**example.batch)
    hook.remove()
    example.model.eval()
    with hf_hardattn.record(example.model) as selections:
        run_towers(example)
    assert selections
    close(run(example), expected, 0)
