"""Law 4 across calls: an encoder's states mean the same to the decoder however they are handed over, and in whichever order their rows are."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from cases import harden, stock
from rounding import assert_rounded
from transformers.modeling_outputs import BaseModelOutput

import hf_hardattn
from hf_hardattn import HardAttentionError

READERS = [
    ("t5", "T5ForConditionalGeneration"),
    ("umt5", "UMT5ForConditionalGeneration"),
    ("bart", "BartForConditionalGeneration"),
    ("whisper", "WhisperForConditionalGeneration"),
]
reading = pytest.mark.parametrize(("architecture", "head"), READERS)
ROWS = {"another order": [2, 0, 1], "repeated": [0, 1, 2, 0, 1, 2], "one row thrice": [1, 1, 1], "one row": [2]}
HOW = {
    "keyword": lambda model, states, words: written(model, encoder_outputs=states, decoder_input_ids=words),
    "position": lambda model, states, words: by_position(model, encoder_outputs=states, decoder_input_ids=words),
    "tuple": lambda model, states, words: written(model, encoder_outputs=(states[0],), decoder_input_ids=words),
    "other output": lambda model, states, words: written(
        model, encoder_outputs=BaseModelOutput(states[0]), decoder_input_ids=words
    ),
    "the decoder alone": lambda model, states, words: model.get_decoder()(words, encoder_hidden_states=states[0])[0],
}


def written(model, *args, **kwargs):
    return model(*args, **kwargs, output_hidden_states=True).decoder_hidden_states[-1]


def by_position(model, **given):
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    last = max(map(names.index, given))
    return written(model, *[given.get(name) for name in names[: last + 1]])


def reader(architecture, head, **config):
    """A model whose encoder keeps different numbers of rows, its input, and the words of the decoder."""
    example = stock(architecture, head, padded=False)
    model = example.model
    config = {"sites": ["encoder.tokens.0"], "budget": "top_p:0.8", "scorer": "linear", **config}
    harden(model, config)
    words = torch.randint(3, 9, (3, 5), generator=torch.Generator().manual_seed(2))
    return model, {model.main_input_name: example.batch[model.main_input_name]}, words


@reading
@pytest.mark.parametrize("how", HOW)
@torch.no_grad()
def test_states_mean_the_same_however_they_are_handed_over(architecture, head, how):
    model, inputs, words = reader(architecture, head)
    states = model.get_encoder()(**inputs)
    assert len(set(states.kept_mask.sum(1).tolist())) > 1, "some slots are unused"
    assert_rounded(HOW[how](model, states, words), written(model, **inputs, decoder_input_ids=words))


@reading
@pytest.mark.parametrize("every", [True, False], ids=["every tensor", "last_hidden_state"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@torch.no_grad()
def test_rows_of_states_keep_what_was_kept_of_them(architecture, head, rows, every):
    model, inputs, words = reader(architecture, head)
    states, expected = copy.copy(model.get_encoder()(**inputs)), written(model, **inputs, decoder_input_ids=words)
    for name, value in list(states.items()):
        if isinstance(value, torch.Tensor) and (every or name == "last_hidden_state"):
            states[name] = value[rows]
    assert_rounded(written(model, encoder_outputs=states, decoder_input_ids=words[rows]), expected[rows])


@reading
def test_states_of_masked_training_need_their_gates(architecture, head):
    model, inputs, words = reader(architecture, head, budget=3, estimator="simple", anneal=0)
    with torch.no_grad():  # with gradients, an encoder called apart is refused
        states = model.train().get_encoder()(**inputs)
    model(encoder_outputs=states, decoder_input_ids=words)
    with pytest.raises(HardAttentionError, match="is given states of 'encoder' alone, which do not tell what was kept"):
        model(encoder_outputs=(states[0],), decoder_input_ids=words)
    states.last_hidden_state = states.last_hidden_state.flip(0)
    with pytest.raises(HardAttentionError, match="last_hidden_state of other rows than kept_gates"):
        model(encoder_outputs=states, decoder_input_ids=words)


def test_a_head_that_copies_its_input_refuses_states_that_do_not_tell_what_was_kept():
    example = stock("bart", "BartModel")
    harden(example.model, {"sites": ["encoder.tokens.0"], "budget": 3})
    ids = example.batch["input_ids"]
    with pytest.raises(HardAttentionError, match="which would bring back the dropped rows"):
        example.model(input_ids=ids, encoder_outputs=(example.model.encoder(ids)[0],))


# ------------------------------------------------------------------------------------------------- attention to the encoder's input


@reading
@pytest.mark.parametrize("sites", [["encoder.tokens.0"], ["encoder.inputs", "encoder.tokens.1", "decoder.cross.1"]])
@pytest.mark.parametrize("budget", [0.5, "top_p:0.6"])
@torch.no_grad()
def test_weights_of_a_cross_attention_are_over_the_input(architecture, head, sites, budget):
    """As masked execution gives them, which computes every row."""
    model, inputs, words = reader(architecture, head, sites=sites, budget=budget)
    model.set_attn_implementation("eager")
    inputs = {**inputs, "decoder_input_ids": words, "output_attentions": True}
    with hf_hardattn.execution(model, "masked"):
        expected = model(**inputs).cross_attentions
    found = model(**inputs).cross_attentions
    states = model.get_encoder()(inputs.pop(model.main_input_name))
    given = model(**inputs, encoder_outputs=states).cross_attentions
    for one, handed, other in zip(found, given, expected, strict=True):
        assert_rounded(one, other)
        assert_rounded(handed, other)


@pytest.mark.parametrize(("architecture", "head"), READERS[:-1])
@torch.no_grad()
def test_weights_of_beams_are_over_the_input(architecture, head):
    model, inputs, _ = reader(architecture, head)
    model.set_attn_implementation("eager")
    options = dict(max_new_tokens=3, min_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    found = [model.generate(**inputs, num_beams=beams, **options).cross_attentions for beams in (1, 2)]
    for one, beams in zip(found[0][0], found[1][0], strict=True):
        assert_rounded(beams[::2], one)


@pytest.mark.parametrize("site", ["encoder.tokens.0", "encoder.inputs", "decoder.cross.*", "encoder.self.*"])
def test_times_of_tokens_need_attention_to_every_frame(site):
    """The method of Transformers divides by how much the attention to a frame varies."""
    example = stock("whisper", "WhisperForConditionalGeneration")
    model, features = example.model, example.batch["input_features"][:1]
    facts = dict(no_timestamps_token_id=50, alignment_heads=[[0, 0], [1, 1]], eos_token_id=1, pad_token_id=0)
    for name, value in (facts | {"decoder_start_token_id": 3}).items():
        setattr(model.generation_config, name, value)
    model.config.median_filter_width = 1
    options = dict(max_new_tokens=5, min_new_tokens=5, return_token_timestamps=True, return_dict_in_generate=True)

    def times():
        return model.generate(features, disable_compile=True, **options)["token_timestamps"]

    expected = times()
    harden(model, {"sites": [site], "budget": 0.5, "scorer": "linear"})
    with hf_hardattn.soft(model):
        assert torch.equal(times(), expected)
    if "self" in site:
        times()
    else:
        with pytest.raises(HardAttentionError, match="the time of a token is found from attention to every frame"):
            times()
    hf_hardattn.remove(model)
    assert torch.equal(times(), expected)
