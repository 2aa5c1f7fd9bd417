"""Vision–language models: rows of an image leave the decoder, the words and everybody's positions stay."""

from __future__ import annotations

import pytest
import torch
from decoders import harden, kept, write
from rounding import SOME, assert_rounded
from vision_language import ALLOWED, BUILDERS, IMAGE, stock, written_by_oracle

import hf_hardattn
from hf_hardattn import HardAttentionError

CONFIGS = {
    "inputs": {"sites": {"decoder.inputs": {"budget": 0.25}}},
    "tokens": {"sites": {"decoder.tokens.1": {"budget": 3}}},
    "both": {"sites": {"decoder.tokens.0": {"budget": "threshold:0.5"}, "decoder.self.1": {"budget": 4}}},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", BUILDERS)
def test_generation_is_that_of_the_stock_model_without_the_dropped_rows(name, config):
    model, batch = stock(name)
    harden(model, CONFIGS[config])
    with hf_hardattn.record(model) as recording:
        found = write(model, batch)
    chosen = kept(recording)
    words = (batch["input_ids"] != IMAGE) & batch["attention_mask"].bool()
    for rows in chosen.values():
        assert bool(rows[words].all()) and not bool(rows[0].all())
    text, logits = written_by_oracle(name, batch, chosen)
    assert torch.equal(found.sequences, text)
    assert_rounded(torch.stack(found.logits, 1)[..., ALLOWED], logits[..., ALLOWED], SOME)
    static = write(model, batch, cache_implementation="static")
    assert torch.equal(static.sequences, found.sequences)
    beams = [
        write(model, batch, num_beams=2, **options).sequences for options in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", BUILDERS)
def test_keeping_all_and_a_prompt_of_words_are_the_stock_model(name):
    model, batch = stock(name)
    expected = write(model, batch).sequences
    words = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    alone = write(model, words).sequences
    harden(model, {"sites": ["decoder.inputs", "decoder.tokens.*"], "budget": 1.0})
    assert torch.equal(write(model, batch).sequences, expected)
    harden(model, {"sites": ["decoder.inputs", "decoder.tokens.*"], "budget": 2})
    assert torch.equal(write(model, words).sequences, alone)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_prompt_of_one_word_is_continued_as_the_stock_model_does(name):
    model, _ = stock(name)
    word = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    expected = write(model, word).sequences
    harden(model, CONFIGS["both"])
    assert torch.equal(write(model, word).sequences, expected)


def learns(selector):
    """Every parameter has a finite gradient, and the scores move. A bias moves them all alike, so that its gradient is 0 but for rounding."""
    gradients = [parameter.grad for parameter in selector.parameters()]
    return all(bool(g.isfinite().all()) for g in gradients) and max(g.abs().max() for g in gradients) > 1e-6


@pytest.mark.parametrize("estimator", ["straight_through", "rloo"])
@pytest.mark.parametrize("name", BUILDERS)
def test_training_reaches_every_selector(name, estimator, tmp_path):
    model, batch = stock(name)
    harden(model, {**CONFIGS["tokens"], "estimator": estimator}).train()
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    torch.manual_seed(4)
    with hf_hardattn.record(model) as recording:
        model(**batch, labels=labels).loss.backward()
    assert bool(kept(recording)["decoder.tokens.1"][:, -3:].all())
    for selector in hf_hardattn.selectors(model).values():
        assert learns(selector)
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(write(again, batch).sequences, write(model, batch).sequences)


def test_the_image_tower_of_llava_chooses_keys():
    model, batch = stock("llava")
    expected = write(model, batch).logits[0]
    harden(model, {"sites": ["vision.self.*", "decoder.tokens.0"], "budget": 5, "estimator": "rloo"})
    with hf_hardattn.record(model) as recording:
        found = write(model, batch).logits[0]
    assert recording.sites == ["vision.self.0", "vision.self.1", "decoder.tokens.0"]
    assert not torch.allclose(found, expected, atol=1e-3)
    labels = torch.where(batch["input_ids"] >= 20, batch["input_ids"], -100).masked_fill(
        batch["input_ids"] == IMAGE, -100
    )
    model.train()(**batch, labels=labels).loss.backward()
    for site, selector in hf_hardattn.selectors(model).items():
        assert learns(selector), site
    with pytest.raises(HardAttentionError, match="vision.tokens"):
        hf_hardattn.apply(model, {"sites": ["vision.tokens.0"], "budget": 5})


def test_embeddings_alone_are_refused():
    model, batch = stock("llava")
    harden(model, CONFIGS["inputs"])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(HardAttentionError, match="at 'decoder.inputs' it is not known which rows belong to an image"):
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])


def test_verify_knows_that_the_rows_are_made():
    model, batch = stock("llava")
    report = hf_hardattn.verify(harden(model, CONFIGS["inputs"]), batch)
    assert report.parity_ok and "its candidates are computed, not read from the batch" in report.sites[0].statement
