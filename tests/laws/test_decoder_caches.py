"""Caches that the caller changes: what is stored with a cache follows its examples, and rows of a prompt are never counted wrongly."""

from __future__ import annotations

import copy

import pytest
import torch
import vision_language
from cases import harden as harden_example
from cases import stock as example
from decoders import DECODERS, harden, kept, oracle, prompts, stock, write
from rounding import SOME, assert_rounded
from transformers import DynamicCache

import hf_hardattn
from hf_hardattn import HardAttentionError

SITES = ("decoder.tokens.0", "decoder.inputs", "decoder.self.0", "decoder.self.1")
CHANGES = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
}
MORE = torch.randint(3, 53, (2, 4), generator=torch.Generator().manual_seed(7))


def hard(site, name="llama", **options):
    return harden(stock(name), {"sites": [site], "budget": 0.5, "scorer": "linear", **options})


def read(model, inputs, **options):
    """The cache of a prompt."""
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs, position_ids=positions, use_cache=True, **options).past_key_values


def read_on(model, mask, cache, ids):
    """Logits of ``ids`` behind a prompt of the mask ``[B, N]``."""
    mask = torch.cat((mask, torch.ones_like(ids)), 1)
    positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("name", "site"), [("llama", site) for site in SITES] + [("mistral", "decoder.inputs"), ("qwen3", "decoder.self.*")]
)
def test_a_prompt_follows_the_examples_of_its_cache(name, site, change):
    model, batch, (apply, examples) = hard(site, name), prompts(), CHANGES[change]
    for options in ({}, {"execution": "masked"}):
        with hf_hardattn.execution(model, options.get("execution", "gathered")):
            cache = read(model, batch)
            apply(cache)
            found = read_on(model, batch["attention_mask"][examples], cache, MORE[examples])
            for row, number in enumerate(examples):
                length = int(batch["attention_mask"][number].sum())
                alone = {key: value[number : number + 1, -length:] for key, value in batch.items()}
                expected = read_on(model, alone["attention_mask"], read(model, alone), MORE[number : number + 1])
                assert_rounded(found[row], expected[0], SOME)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("budget", [0.5, "threshold:0.5"])
@pytest.mark.parametrize(
    ("architecture", "head"), [("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")]
)
def test_the_keys_of_a_source_follow_the_examples_of_their_cache(architecture, head, budget, change):
    made = example(architecture, head)
    model = harden_example(made.model, {"sites": ["decoder.cross.*"], "budget": budget, "scorer": "linear"})
    ids, mask = made.batch["input_ids"][:2], made.batch["attention_mask"][:2]
    apply, examples = CHANGES[change]

    def step(rows, apply, examples):
        with torch.no_grad():
            encoded = model.get_encoder()(ids[rows], attention_mask=mask[rows])
            source = {"encoder_outputs": encoded, "attention_mask": mask[rows]}
            cache = model(**source, decoder_input_ids=MORE[rows], use_cache=True).past_key_values
            apply(cache)
            encoded.last_hidden_state = encoded.last_hidden_state[examples]
            source = {"encoder_outputs": encoded, "attention_mask": mask[rows][examples]}
            words = MORE[rows][examples, :1]
            return model(**source, decoder_input_ids=words, past_key_values=cache, use_cache=True).logits

    found = step([0, 1], apply, examples)
    for row, number in enumerate(examples):
        assert_rounded(found[row], step([number], lambda cache: None, [0])[0], SOME)


@pytest.mark.parametrize("site", SITES)
def test_a_prompt_cannot_be_cropped(site):
    model, one = hard(site), prompts(padded=False)
    cache = read(model, one)
    expected = read_on(model, one["attention_mask"], copy.deepcopy(cache), MORE)
    read_on(model, one["attention_mask"], cache, MORE.flip(0))
    cache.crop(-4)  # all that was read since
    assert_rounded(read_on(model, one["attention_mask"], copy.deepcopy(cache), MORE), expected, SOME)
    cache.crop(-4)
    for ids in (MORE, MORE[:, :1]):
        with pytest.raises(HardAttentionError, match="holds . rows where the prompt left .*it cannot be cropped"):
            read_on(model, one["attention_mask"][:, :8], copy.deepcopy(cache), ids)


def test_a_whole_prompt_can_be_cropped():
    """Where nothing was dropped, a cropped cache is what the stock model's is."""
    model, one = harden(stock("llama"), {"sites": ["decoder.tokens.0"], "budget": 50}), prompts(padded=False)
    cache, plain = read(model, one), read(stock("llama"), one)
    found, expected = (
        read_on(each, one["attention_mask"][:, :8], cache, MORE)
        for each, cache in ((model, cache), (stock("llama"), plain))
        if cache.crop(-4) is None
    )
    assert_rounded(found, expected, SOME)


def test_an_answer_read_with_its_prompt_can_be_cropped():
    """As assisted decoding does with drafts; here the labels tell where the answer begins."""
    model, one = hard("decoder.tokens.0"), prompts(padded=False)
    labels = one["input_ids"].clone()
    labels[:, :8] = -100
    with hf_hardattn.record(model) as recording:
        cache = read(model, one, labels=labels)
    cache.crop(-4)
    found = read_on(model, one["attention_mask"][:, :8], copy.deepcopy(cache), MORE)
    text = {"input_ids": torch.cat((one["input_ids"][:, :8], MORE), 1), "attention_mask": one["attention_mask"]}
    chosen = {site: rows[:, :8] for site, rows in kept(recording).items()}
    assert_rounded(found, oracle(stock("llama"), text, chosen, None, 8)[:, 8:], SOME)
    cache.crop(-1)
    with pytest.raises(HardAttentionError, match="it cannot be cropped"):
        read_on(model, one["attention_mask"][:, :7], cache, MORE)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("site", SITES)
def test_a_cache_rebuilt_from_its_tensors_is_refused(site, count):
    model, one = hard(site), prompts(padded=False)
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in read(model, one).layers])
    with pytest.raises(
        HardAttentionError, match=f"the cache given to '{site}' holds rows that this model did not read"
    ):
        read_on(model, one["attention_mask"], rebuilt, MORE[:, :count])


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_of_one_token_is_continued_as_the_stock_model_does(name):
    """Nothing is dropped of it; a second turn of several rows finds the record of the first."""
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    model = hard("decoder.tokens.0", name)
    assert torch.equal(write(model, batch).sequences, write(stock(name), batch).sequences)
    found, expected = (
        read_on(each, batch["attention_mask"], read(each, batch), MORE[:1]) for each in (model, stock(name))
    )
    assert_rounded(found, expected, SOME)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("site", ["decoder.inputs", "decoder.self.0"])
@pytest.mark.parametrize("name", ["llama", *vision_language.BUILDERS])
def test_no_row_of_a_second_turn_is_read_twice(name, site, options):
    """generate() takes the length of the first layer's cache for that of the text, whatever positions the model is given."""
    model, batch = (stock(name), prompts()) if name == "llama" else vision_language.stock(name)
    harden(model, {"sites": [site], "budget": 0.5, "scorer": "linear"})
    first = write(model, batch, **options)
    text = torch.cat((first.sequences, torch.full((2, 3), 9)), 1)
    mask = torch.nn.functional.pad(
        batch["attention_mask"], (0, text.shape[1] - batch["attention_mask"].shape[1]), value=1
    )
    turns = [{"input_ids": text, "attention_mask": mask}]
    if "mm_token_type_ids" in batch:
        types = batch["mm_token_type_ids"]
        turns.append(
            {**turns[0], "mm_token_type_ids": torch.nn.functional.pad(types, (0, text.shape[1] - types.shape[1]))}
        )
    for turn in turns:
        with pytest.raises(HardAttentionError, match=r"generate\(\) cannot continue from a cache whose first layer"):
            write(model, turn, past_key_values=copy.deepcopy(first.past_key_values), max_new_tokens=1, min_new_tokens=1)
