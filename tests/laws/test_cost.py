"""Law 18: what a site adds is counted: kernels, waits for the device, breaks in a compiled graph. Times are a benchmark."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from cases import (
    HEADS,
    PLACES,
    Case,
    Example,
    can_generate,
    close,
    harden,
    head_places,
    run,
    stock,
    tensors,
)
from rounding import MANY, assert_rounded
from torch.utils._python_dispatch import TorchDispatchMode

import hf_hardattn
from hf_hardattn.efficiency.host import count_kernels
from hf_hardattn.models import family_of

named = {"ids": lambda place: f"{place.architecture}-{place.group}-{place.heads[0]}"}
MOST = 12  # kernels of a site: score, sort, take, sort
WITH_BIAS = 22  # each layer of T5 also reads its table of distances at the kept keys
PADDED = 21  # kernels of a site whose rows differ in length: which rank is kept in each, too
BY_PARTS = 46  # and of each layer of T5, whose bias towards the keys of each text is made for some texts at a time
RESTORING = 8  # of a whole tower that gives its rows their places again
COPYING = 22  # of a head that feeds its decoder the input again: its copy is made of what was kept


# ----------------------------------------------------------------------------------------------------------------------- kernels


def kernels(example: Example) -> Counter[str]:
    def call():
        with torch.inference_mode():
            example.model(**example.batch)

    call()  # what is made once must not be counted
    return count_kernels(call)


@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_keeping_all_launches_the_kernels_of_stock(architecture, head):
    example = stock(architecture, head)
    expected = kernels(example)
    harden(example.model, {"sites": ["*"], "budget": 1.0})
    assert kernels(example) == expected
    hf_hardattn.apply(example.model, {"sites": ["*"], "estimator": "soft"})
    assert kernels(example) == expected


@pytest.mark.parametrize(("architecture", "head"), [pair for pair in HEADS if can_generate(*pair)])
def test_keeping_all_generates_with_the_kernels_of_stock(architecture, head):
    example = stock(architecture, head)
    inputs = {name: x for name, x in example.batch.items() if name not in ("labels", "decoder_input_ids")}

    def call():
        example.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    call()
    expected = count_kernels(call)
    harden(example.model, {"sites": ["*"], "budget": 1.0})
    call()
    assert count_kernels(call) == expected


def with_and_without_padding():
    for head, place in head_places(lambda place: not place.causal):
        yield head, place, False
        if "attention_mask" in stock(place.architecture, head).batch:
            yield head, place, True


@pytest.mark.parametrize(("head", "place", "padded"), with_and_without_padding())
def test_a_site_adds_few_kernels(head, place, padded):
    """Of causal attention each query chooses among its own past, under a mask of its own."""
    example = stock(place.architecture, head)
    if not padded:
        example.batch.pop("attention_mask", None)
    before = kernels(example)
    harden(example.model, Case(place, head, budget=0.5).config())
    found = kernels(example)
    found.subtract(before)
    added = {name: count for name, count in found.items() if count}
    alone, biased = (PADDED, BY_PARTS) if padded else (MOST, WITH_BIAS)
    most = biased if place.group == "encoder.self" else alone
    copying = head in family_of(example.model).spec.copying_heads and place.group in (
        "encoder.inputs",
        "encoder.tokens",
    )
    once = RESTORING + (COPYING if copying else 0)
    assert sum(added.values()) <= most * len(hf_hardattn.selectors(example.model)) + once, added


# -------------------------------------------------------------------------------------------------------- waiting for the device


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def noted(counter, method):
    def note(*args, **kwargs):
        counter.count += 1
        return method(*args, **kwargs)

    return note


def waits(monkeypatch, call) -> int:
    with monkeypatch.context() as patch, Waits() as counter:
        for name in ("tolist", "numpy", "cpu"):  # on a CPU these do not go through the dispatcher
            patch.setattr(torch.Tensor, name, noted(counter, getattr(torch.Tensor, name)))
        call()
    return counter.count


def test_a_wait_is_noticed(monkeypatch):
    for name in ("item", "tolist", "nonzero", "__bool__"):
        assert waits(monkeypatch, lambda name=name: getattr(torch.ones(1), name)()) == 1


@pytest.mark.parametrize("estimator", ["simple", "reinforce"])
@pytest.mark.parametrize("place", PLACES, **named)
def test_a_fixed_budget_never_waits_for_the_device(place, estimator, monkeypatch):
    """Evaluation, and the forward of a training step with its loss: no more waits than stock has."""
    plain, example = (stock(place.architecture, place.heads[0]) for _ in range(2))
    for budget in (2, 0.5):
        harden(example.model, Case(place, place.heads[0], "linear", estimator, budget).config(baseline="none"))
        for training in (False, True):
            allowed, found = (
                waits(monkeypatch, partial(each.model.train(training), **each.batch)) for each in (plain, example)
            )
            assert found <= allowed, f"{found - allowed} waits at budget {budget}, training={training}"


@pytest.mark.parametrize("site", ["text.inputs", "text.tokens.0"])
def test_a_protected_row_that_moves_costs_no_wait(site, monkeypatch):
    """CLIP keeps the end of a text wherever it stands: one row of each text, so that nobody counts."""
    plain, example = (stock("clip", "CLIPTextModelWithProjection") for _ in range(2))
    harden(example.model, {"sites": [site], "budget": 0.5})
    for training in (False, True):
        allowed, found = (
            waits(monkeypatch, partial(each.model.train(training), **each.batch)) for each in (plain, example)
        )
        assert found <= allowed, f"{found - allowed} waits, training={training}"


# ------------------------------------------------------------------------------------------------------------- one compiled graph

# compiling takes seconds: a few always, all of them among the slow tests
FAST = {
    "evaluation": {("vit", "vision.self"), ("siglip", "vision.inputs")},
    "training": {("vit", "vision.tokens")},
}
# whose training is traced too: each kind once in an encoder, in a decoder, and in a decoder that is also an encoder
TRAINED = ("vit-vision", "t5-encoder", "t5-decoder", "blip-text")


def places(what):
    """Every place; the GRU's stock packs its padded rows, which Dynamo does not trace."""
    for place in PLACES:
        tower = f"{place.architecture}-{place.group.split('.')[0]}"
        if place.architecture != "gru" and (what == "evaluation" or tower in TRAINED):
            fast = (place.architecture, place.group) in FAST[what]
            yield pytest.param(place, marks=() if fast else pytest.mark.slow)


def small(place, **config) -> Example:
    """Few layers: compiling takes a second each."""
    changes = {
        "blip": {},
        "t5": {"num_layers": 2, "num_decoder_layers": 1},
    }.get(place.architecture, {"num_hidden_layers": 2})
    example = stock(place.architecture, place.heads[0], **changes)
    harden(example.model, Case(place, place.heads[0], "linear", "simple", 2).config(**config))
    return example


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("place", places("evaluation"), **named)
def test_evaluation_is_one_graph(place):
    example = small(place)
    close(run(Example(compiled(example.model), example.batch)), run(example))


@pytest.mark.parametrize("place", places("training"), **named)
def test_training_is_one_graph_with_the_gradients_of_eager(place):
    assert_same_gradients(small(place, entropy_weight=0.1), "eager")


@pytest.mark.slow
def test_training_compiled_ahead_of_time_has_the_gradients_of_eager():
    place = next(place for place in PLACES if (place.architecture, place.group) == ("vit", "vision.tokens"))
    assert_same_gradients(small(place), "aot_eager")


def assert_same_gradients(example: Example, backend: str) -> None:
    twin = Example(copy.deepcopy(example.model), example.batch)
    example.model.train(), twin.model.train()
    _step(twin, twin.model)
    _step(example, compiled(example.model, backend))
    for (name, one), other in zip(example.model.named_parameters(), twin.model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert_rounded(one.grad, other.grad, MANY, name)


def _step(example: Example, model) -> None:
    torch.manual_seed(3)
    found = tensors(model(**example.batch))
    trained = [value for value in found.values() if value.requires_grad]
    (found["loss"] if "loss" in found else sum(value.square().mean() for value in trained)).backward()


@pytest.mark.parametrize(
    "site",
    [
        "decoder.cross.*",
        *(pytest.param(site, marks=pytest.mark.slow) for site in ("decoder.self.*", "encoder.tokens.0", "*")),
    ],
)
def test_decoding_with_a_static_cache_is_one_graph(site):
    """The step behind the prefill, which generate() compiles."""
    from transformers import EncoderDecoderCache, StaticCache

    def decode(model, step):
        config = model.config.get_text_config(decoder=True)
        with torch.no_grad():
            encoded = model.get_encoder()(example.batch["input_ids"], attention_mask=example.batch["attention_mask"])
            rows = encoded.last_hidden_state.shape[1]
            cache = EncoderDecoderCache(StaticCache(config, max_cache_len=6), StaticCache(config, max_cache_len=rows))
            inputs = {"encoder_outputs": encoded, "attention_mask": example.batch["attention_mask"]}
            first = torch.zeros(3, 1, dtype=torch.long)
            model(**inputs, decoder_input_ids=first, past_key_values=cache, use_cache=True)
            return [
                step(**inputs, decoder_input_ids=first + n, past_key_values=cache, use_cache=True).logits
                for n in (5, 6)
            ]

    example = stock("t5", "T5ForConditionalGeneration", num_layers=1, num_decoder_layers=1)
    torch._dynamo.reset()
    decode(example.model, compiled(example.model))  # stock is one graph
    harden(example.model, {"sites": [site], "budget": 3})
    expected = decode(example.model, example.model)
    found = decode(example.model, compiled(example.model))
    for one, other in zip(found, expected, strict=True):
        assert_rounded(one, other)


def test_the_second_call_of_a_compiled_layer_compiles_nothing():
    example = stock("vit", "ViTForImageClassification")
    harden(example.model, {"sites": ["*"], "budget": 3})
    expected = run(example)
    torch._dynamo.reset()
    for layer in family_of(example.model).towers(example.model)["vision"].layers:
        layer.compile(backend="eager", fullgraph=True)
    close(run(example), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(run(example), expected)
