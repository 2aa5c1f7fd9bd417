"""What Transformers expects of every model, held by models whose config carries ``hard_attention``: built from config, saved,
reloaded, resized, checkpointed, compiled, exported, copied, and asked for attentions, hidden states, tuples and losses."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import Example, build
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, T5ForConditionalGeneration, ViTForImageClassification
from transformers.initialization import no_init_weights

import hf_hardattn

sys.path.insert(0, str(Path(__file__).parent / "laws"))
from rounding import assert_rounded  # noqa: E402

PLACES = [
    ("vit", "ViTForImageClassification", "vision.inputs"),
    ("vit", "ViTForMaskedImageModeling", "vision.tokens.*"),
    ("vit", "ViTForImageClassification", "vision.self.*"),
    ("t5", "T5ForConditionalGeneration", "encoder.inputs"),
    ("t5", "T5ForConditionalGeneration", "encoder.tokens.*"),
    ("t5", "T5ForConditionalGeneration", "*.self.*"),
    ("t5", "T5ForConditionalGeneration", "decoder.cross.*"),
    ("blip", "BlipForConditionalGeneration", "vision.tokens.*"),
    ("blip", "BlipForConditionalGeneration", "text.*"),
    ("blip", "BlipForImageTextRetrieval", "vision.self.*"),
]
T5_PLACES = [place for place in PLACES if place[0] == "t5"]
GENERATING = [place for place in PLACES if place[1].endswith("ConditionalGeneration")]

place = pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p[1]}-{p[2]}")
generating = pytest.mark.parametrize("place", GENERATING, ids=lambda p: f"{p[1]}-{p[2]}")
budget = pytest.mark.parametrize("budget", [1.0, 0.5])


def example(place: tuple[str, str, str], hard: bool = True, **changes: Any) -> Example:
    """A tiny model built from a config with sites at ``place``, with weights large enough for selections to matter."""
    torch.manual_seed(0)
    attention = {name: changes.pop(name) for name in ("attn_implementation",) if name in changes}
    made = build(place[0], place[1])
    config, batch = made.model.config, made.batch
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if hard:
        config.hard_attention = {
            "sites": [place[2]],
            "scorer": "linear",
            "budget": 0.5,
            "estimator": "straight_through",
            **changes,
        }
    model = type(made.model)._from_config(config, **attention)
    model.load_state_dict(made.model.state_dict(), strict=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for selector in hf_hardattn.selectors(model).values():
            for parameter in selector.parameters():
                parameter.normal_(std=0.5)
    return Example(model.eval(), batch)


def first(made: Example, **kwargs: Any) -> torch.Tensor:
    """The logits (or what stands first without a loss) of the model on its batch."""
    with torch.no_grad():
        output = made.model(**{**made.batch, **kwargs})
    return next(v for k, v in output.items() if k != "loss" and isinstance(v, torch.Tensor))


@place
def test_save_and_load_give_the_same_model(place, tmp_path):
    made = example(place)
    made.model.save_pretrained(tmp_path)
    loaded, info = type(made.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(first(Example(loaded.eval(), made.batch)), first(made))
    loaded.save_pretrained(tmp_path / "again")  # from_pretrained adds fields to the config; they must load too
    again = type(made.model).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(first(Example(again, made.batch)), first(made))


@place
def test_every_weight_is_initialised_from_meta(place):
    """No weight from any file: all go from meta through ``_init_weights``."""
    config = example(place).model.config
    cls = type(example(place).model)
    model = cls.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for selector in hf_hardattn.selectors(model).values():
        # linear: weights of 0.02 / sqrt(D), a zero bias; uninitialised memory is neither
        assert 0 < selector.scorer.weight.std() < 0.02 and not selector.scorer.bias.any()
    with torch.device("meta"), no_init_weights():
        assert all(p.is_meta for p in cls(copy.deepcopy(config)).parameters())


@pytest.mark.parametrize("where", [PLACES[0], ("bart", "BartForConditionalGeneration", "encoder.inputs")], ids=str)
def test_a_file_without_any_weight_is_reported_as_transformers_does(tmp_path, where):
    """Lacking selectors alone raise; a file of another model altogether gives the full list of missing keys."""
    model = example(where).model
    model.save_pretrained(tmp_path)
    save_file({"tensor": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) >= set(dict(model.named_parameters()))
    stock = {name: value.clone() for name, value in model.state_dict().items() if "selector" not in name}
    save_file(stock, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_hardattn.HardAttentionError, match="weights lack 2 selector tensors"):
        type(model).from_pretrained(tmp_path)


@place
@budget
def test_attentions_and_hidden_states_have_the_stock_shapes(place, budget):
    """Dropped keys have weight zero; with rows dropped, later entries shrink.

    The first entry is what the first layer computes on: whole, unless the rows were dropped before it.
    """
    hard = example(place, attn_implementation="eager", budget=budget)
    stock = example(place, hard=False, attn_implementation="eager")
    rows_dropped = "inputs" in place[2] or "tokens" in place[2]
    for names in ("attentions", "hidden_states"):
        with torch.no_grad():
            found = hard.model(**hard.batch, **{f"output_{names}": True})
            expected = stock.model(**stock.batch, **{f"output_{names}": True})
        assert found.keys() == expected.keys()
        for key in found:
            if not key.endswith(names) or found[key] is None:
                continue
            assert len(found[key]) == len(expected[key]), key
            if budget == 1.0 or not rows_dropped:
                assert [t.shape for t in found[key]] == [t.shape for t in expected[key]], key
            elif names == "hidden_states" and "inputs" not in place[2]:
                assert found[key][0].shape == expected[key][0].shape
            if budget == 0.5 and names == "attentions" and not rows_dropped:
                sums = torch.stack([t.sum(-1) for t in found[key]])
                torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("place", [p for p in PLACES if "ViT" in p[1] or p[0] == "t5"], ids=lambda p: f"{p[1]}-{p[2]}")
def test_gradients_are_retained_on_hidden_states_and_attentions(place):
    made = example(place, attn_implementation="eager")
    output = made.model.train()(**made.batch, output_attentions=True, output_hidden_states=True)
    kept = [v[0] for k, v in output.items() if k.endswith(("attentions", "hidden_states")) and isinstance(v, tuple)]
    if place[2].startswith("encoder.") and "self" not in place[2]:
        kept = [
            t for t in kept if t is not output["cross_attentions"][0]
        ]  # a copy over the encoder's input, in which nothing is computed
    for tensor in kept:
        tensor.retain_grad()
    (output["logits"] if "logits" in output else output["reconstruction"]).flatten()[0].backward()
    assert len(kept) >= 2 and all(tensor.grad is not None for tensor in kept)


@pytest.mark.parametrize("place", PLACES[3:], ids=lambda p: f"{p[1]}-{p[2]}")
def test_embeddings_are_resized_and_stay_tied(place):
    made = example(place)
    before, size = first(made), made.model.get_input_embeddings().num_embeddings
    made.model.resize_token_embeddings(size + 7)
    after = first(made)
    if after.shape[-1] == size + 7:
        after = after[..., :size]
    assert_rounded(after, before)
    if place[0] == "t5":
        assert made.model.lm_head.weight is made.model.shared.weight or not made.model.config.tie_word_embeddings
        assert made.model.shared.weight is made.model.encoder.embed_tokens.weight


@place
@budget
def test_tuples_equal_dicts_and_the_loss_comes_first(place, budget):
    # a tuple has no names, so a score-function estimator gives its rows one reward, where something was dropped
    made = example(place, budget=budget, estimator="reinforce" if budget == 1.0 else "simple")
    for training in (False, True):
        made.model.train(training)
        outputs = []
        for return_dict in (True, False):
            torch.manual_seed(7)
            outputs.append(made.model(**made.batch, return_dict=return_dict))
        as_dict, as_tuple = outputs[0].to_tuple(), outputs[1]
        assert len(as_dict) == len(as_tuple)
        for a, b in zip(as_dict, as_tuple, strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b)


@place
def test_determinism_copies_and_pickles(place):
    made = example(place)
    expected = first(made)
    assert torch.equal(first(made), expected)
    for twin in (copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
        assert torch.equal(first(Example(twin, made.batch)), expected)
        for parameter in twin.parameters():
            parameter.data.zero_()
    assert torch.equal(first(made), expected)  # a copy shares nothing


@place
@budget
def test_a_row_alone_equals_the_row_in_the_batch(place, budget):
    made = example(place, budget=budget)
    together = first(made)
    for row in range(3):
        one = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in made.batch.items()}
        assert_rounded(first(Example(made.model, one))[0], together[row])


@pytest.mark.parametrize("place", PLACES[:7], ids=lambda p: f"{p[1]}-{p[2]}")  # stock BLIP is eager only
@budget
def test_eager_equals_sdpa(place, budget):
    eager, sdpa = (example(place, budget=budget, attn_implementation=name) for name in ("eager", "sdpa"))
    assert_rounded(first(sdpa), first(eager))
    eager.model.set_attn_implementation("sdpa")
    assert torch.equal(first(eager), first(sdpa))  # the same computation now


@pytest.mark.parametrize("place", [PLACES[0], PLACES[7]], ids=lambda p: f"{p[1]}-{p[2]}")
def test_evaluation_exports(place):
    made = example(place, budget=0.5)
    inputs = made.batch
    with torch.no_grad():
        program = torch.export.export(made.model, (), inputs, strict=False)
        torch.testing.assert_close(program.module()(**inputs)[0], made.model(**inputs)[0])


@pytest.mark.parametrize("place", T5_PLACES, ids=lambda p: p[2])
def test_embeddings_in_the_place_of_ids(place):
    made = example(place)
    expected, batch = first(made), dict(made.batch)
    batch["inputs_embeds"] = made.model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(first(Example(made.model, batch)), expected)


def test_chunked_feed_forward_changes_nothing():
    made = example(("blip", "BlipForConditionalGeneration", "text.*"))
    expected = first(made)
    for layer in made.model.text_decoder.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    assert_rounded(first(made), expected)


def test_a_device_map_finds_the_blocks():
    """No module changes its class, so the stock names of what stays on one device still name modules of the model."""
    model = example(("t5", "T5ForConditionalGeneration", "encoder.tokens.*")).model
    present = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) == {"T5Block"} <= present


def generate(made: Example, **kwargs: Any) -> Any:
    inputs = {k: v for k, v in made.batch.items() if k in ("input_ids", "attention_mask", "pixel_values")}
    made.model.generation_config.eos_token_id = None
    torch.manual_seed(11)
    return made.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, **kwargs)


@generating
@budget
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_generate_with_a_cache_equals_generate_without(place, budget, how):
    made = example(place, budget=budget)
    assert torch.equal(generate(made, **how), generate(made, use_cache=False, **how))
    if budget == 1.0:
        assert torch.equal(generate(made, **how), generate(example(place, hard=False), **how))


@pytest.mark.parametrize("place", T5_PLACES, ids=lambda p: p[2])
@budget
def test_generate_variants(place, budget):
    """Static cache, given encoder outputs, an assistant and prompt lookup all write what greedy search writes."""
    made = example(place, budget=budget, attn_implementation="sdpa")
    expected = generate(made)
    assert torch.equal(generate(made, cache_implementation="static", disable_compile=True), expected)
    ids, mask = made.batch["input_ids"], made.batch["attention_mask"]
    encoded = made.model.get_encoder()(ids, attention_mask=mask)
    given = made.model.generate(encoder_outputs=encoded, attention_mask=mask, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(given, expected)
    one = Example(made.model, {"input_ids": ids[:1], "attention_mask": mask[:1]})
    for how in ({"assistant_model": copy.deepcopy(made.model)}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(generate(one, **how), generate(one))


@pytest.mark.parametrize("place", T5_PLACES, ids=lambda p: p[2])
def test_generate_returns_what_stock_returns(place):
    """Attentions, hidden states and the cache of every step; at budget 1.0 the self-attention cache has its stock shape."""
    sizes = []
    for hard in (True, False):
        made = example(place, hard=hard, attn_implementation="eager", **({"budget": 1.0} if hard else {}))
        out = generate(
            made, num_beams=2, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True
        )
        layers = out.past_key_values.self_attention_cache.layers
        cached = [(layer.keys.shape, layer.values.shape) for layer in layers if layer.is_initialized]
        steps = (*out.decoder_attentions, *out.cross_attentions, *out.decoder_hidden_states)
        whole = (*out.encoder_attentions, *out.encoder_hidden_states)
        sizes.append((cached, [[t.shape for t in step] for step in steps], [t.shape for t in whole]))
    assert sizes[0] == sizes[1]


def test_left_padded_rows_equal_the_rows_alone():
    made = example(("t5", "T5ForConditionalGeneration", "encoder.self.*"))
    ids = made.batch["input_ids"][:1, :6]
    padded, mask = torch.nn.functional.pad(ids, (4, 0)), torch.ones(1, 10, dtype=torch.long)
    mask[:, :4] = 0
    start = made.batch["decoder_input_ids"][:1]
    with torch.no_grad():
        found = made.model(input_ids=padded, attention_mask=mask, decoder_input_ids=start).logits
        expected = made.model(input_ids=ids, decoder_input_ids=start).logits
    assert_rounded(found, expected)


def test_auto_classes_and_from_config_make_hard_models():
    config = example(PLACES[0]).model.config
    for model in (AutoModelForImageClassification.from_config(config), ViTForImageClassification(config)):
        assert list(hf_hardattn.selectors(model)) == ["vision.inputs"]
    assert not hf_hardattn.selectors(T5ForConditionalGeneration(example(PLACES[3], hard=False).model.config))
