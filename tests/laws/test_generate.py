"""Law 5: generate() with a cache, with beams and with sampling equals generate() without a cache."""

from __future__ import annotations

import pytest
import torch
from cases import HEADS, all_sites, can_generate, harden, has_kind, stock
from rounding import MANY, assert_rounded

import hf_hardattn

WRITERS = [(architecture, head) for architecture, head in HEADS if can_generate(architecture, head)]
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
}
CONFIGS = {
    "rows": {"sites": ["{rows}"], "budget": 0.5},
    "self": {"sites": ["{self}"], "budget": 0.5},
    "self, three": {"sites": ["{self}"], "budget": 3, "per_head": True},
    "self, per query": {"sites": ["{self}"], "budget": 2, "scorer": "query_key"},
    "cross": {"sites": ["{cross}"], "budget": 0.4, "scorer": "mlp"},
    "cross, per head": {"sites": ["{cross}"], "budget": 2, "per_head": True},
    "cross, one per query": {"sites": ["{cross}"], "budget": 1, "scorer": "query_key"},
    "cross, threshold": {"sites": ["{cross}"], "budget": "threshold:0.5"},
    "everything": {"sites": ["*"], "budget": 0.6},
    "everything, per query": {
        "sites": {"{self}": {}, "{cross}": {}, "{rows}": {"scorer": "first"}},
        "scorer": "query_key",
        "budget": 3,
    },
}


KINDS = {"{self}": "self", "{cross}": "cross", "{rows}": "inputs"}


def configured(names):
    """Each writer with each named configuration whose sites it has."""
    return [
        (*writer, name)
        for writer in WRITERS
        for name in names
        if all(place == "*" or has_kind(*writer, KINDS[place]) for place in CONFIGS[name]["sites"])
    ]


def filled(model, config):
    """The configuration with the sites of this model: its decoder's, and the rows of its first tower."""
    causal = next(s for s in reversed(all_sites(model)) if ".cross" in s).split(".")[0]
    first = next(iter(all_sites(model))).split(".")[0]
    names = {"{self}": f"{causal}.self.*", "{cross}": f"{causal}.cross.*", "{rows}": f"{first}.[it]*"}
    sites = config["sites"]
    renamed = (
        {names.get(k, k): v for k, v in sites.items()} if isinstance(sites, dict) else [names.get(k, k) for k in sites]
    )
    return {**config, "sites": renamed}


def write(example, seed=5, **options):
    inputs = {name: x for name, x in example.batch.items() if name not in ("labels", "decoder_input_ids")}
    torch.manual_seed(seed)
    return example.model.generate(
        **inputs,
        **{**dict(max_new_tokens=6, min_new_tokens=6), **options},
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("architecture", "head", "name"), configured(CONFIGS))
def test_a_cache_changes_nothing(architecture, head, name, mode):
    example = stock(architecture, head)
    harden(example.model, filled(example.model, CONFIGS[name]))
    with_cache = write(example, use_cache=True, **MODES[mode])
    without = write(example, use_cache=False, **MODES[mode])
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        assert_rounded(one, other, MANY)


@pytest.mark.parametrize(("architecture", "head", "name"), configured(["rows", "cross", "everything"]))
def test_masked_generates_what_gathered_does(architecture, head, name):
    example = stock(architecture, head)
    harden(example.model, filled(example.model, CONFIGS[name]))
    gathered = write(example, num_beams=3).sequences
    with hf_hardattn.execution(example.model, "masked"):
        assert torch.equal(write(example, num_beams=3).sequences, gathered)


@pytest.mark.parametrize(("architecture", "head"), WRITERS)
def test_the_selection_changes_what_is_written(architecture, head):
    example = stock(architecture, head)
    soft = write(example)
    harden(example.model, filled(example.model, CONFIGS["everything"]))
    hard = write(example)
    assert not torch.allclose(soft.logits[0], hard.logits[0], atol=1e-2)


def cross_layers(example):
    cache = write(example).past_key_values.cross_attention_cache
    return [layer for layer in cache.layers if layer.keys is not None]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("scorer", ["linear", "key_norm", "attention", "query_key"])
def test_repeated_words_tie_with_and_without_a_cache(scorer, per_head):
    example = stock("t5", "T5ForConditionalGeneration")
    model = harden(example.model, {"sites": ["decoder.self.*"], "budget": 2, "scorer": scorer, "per_head": per_head})
    torch.manual_seed(1)
    words = torch.randint(3, 6, (24, 20))  # three words only: what is kept of them is decided by ties
    with torch.no_grad():
        encoded = model.get_encoder()(torch.randint(3, 6, (24, 8)))
        whole = model(encoder_outputs=encoded, decoder_input_ids=words).logits
        steps, cache = [], None
        for word in words.split(1, dim=1):
            step = model(encoder_outputs=encoded, decoder_input_ids=word, past_key_values=cache, use_cache=True)
            steps.append(step.logits)
            cache = step.past_key_values
    assert_rounded(torch.cat(steps, 1), whole, MANY)


@pytest.mark.parametrize(("architecture", "head"), WRITERS)
def test_the_cross_cache_holds_what_was_kept(architecture, head):
    example = stock(architecture, head)
    harden(example.model, filled(example.model, {"sites": ["{cross}"], "budget": 3}))
    kept = 3 if architecture == "gru" else 4  # three, and the one that T5 and BLIP keep always
    for layer in cross_layers(example):
        assert layer.keys.shape[2] == layer.values.shape[2] == kept
    if not has_kind(architecture, head, "inputs"):
        return
    harden(example.model, filled(example.model, {"sites": ["{rows}"], "budget": 3}))
    rows = 4 if (architecture, head) != ("blip", "BlipForQuestionAnswering") else 7  # its answers read the question
    assert all(layer.keys.shape[2] == rows for layer in cross_layers(example))


@pytest.mark.parametrize(("architecture", "head"), WRITERS)
def test_generate_is_recorded(architecture, head):
    example = stock(architecture, head)
    harden(example.model, {"sites": ["*"], "budget": 2})
    with hf_hardattn.record(example.model) as selections:
        steps = len(write(example).logits)
    assert set(selections.sites) == set(all_sites(example.model))
    for site, kind in all_sites(example.model).items():
        causal = selections[site][0].valid.shape[2] > 1 or len(selections[site]) > 1
        assert len(selections[site]) == (steps if kind == "self" and causal else 1)
