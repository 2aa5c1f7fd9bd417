"""Vision–language models: rows of an image leave the decoder, the words and everybody's positions stay."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from decoders import SIZES, STEPS, harden, hiding, kept, write
from rounding import SOME, assert_rounded
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import hf_hardattn
from hf_hardattn import HardAttentionError

IMAGE, START, END, VIDEO = 45, 46, 47, 48
CONFIGS = {
    "inputs": {"sites": {"decoder.inputs": {"budget": 0.25}}},
    "tokens": {"sites": {"decoder.tokens.1": {"budget": 3}}},
    "both": {"sites": {"decoder.tokens.0": {"budget": "threshold:0.5"}, "decoder.self.1": {"budget": 4}}},
}


def llava() -> tuple[Any, dict[str, Any]]:
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=29)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=IMAGE, vision_feature_layer=-1
    )
    # the second row is padded on the left
    ids = torch.tensor([[3, 4, 5, *[IMAGE] * 16, 20, 21, 22], [0, 0, 6, *[IMAGE] * 16, 23, 24, 25]])
    return LlavaForConditionalGeneration._from_config(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


def qwen() -> tuple[Any, dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = dict(depth=2, hidden_size=24, intermediate_size=29, num_heads=3, patch_size=4, out_hidden_size=24)
    config = Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": rope, "head_dim": None},
        vision_config={**vision, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VIDEO,
    )
    ids = torch.tensor([[3, 4, START, *[IMAGE] * 16, END, 5, 6], [0, 8, START, *[IMAGE] * 16, END, 9, 10]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(128, 96), "image_grid_thw": torch.tensor([[1, 8, 8]] * 2)}
    return Qwen2_5_VLForConditionalGeneration._from_config(config), {**batch, "mm_token_type_ids": (ids == IMAGE).int()}


@functools.cache
def _stock(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = {"llava": llava, "qwen": qwen}[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.suppress_tokens = [IMAGE, START, END, VIDEO]
    return model.eval(), {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def stock(name: str) -> tuple[Any, dict[str, Any]]:
    model, batch = _stock(name)
    return copy.deepcopy(model), dict(batch)


def oracle(name: str, batch: dict[str, Any], chosen: dict[str, torch.Tensor], prompt: int) -> torch.Tensor:
    """Logits of the stock model without a cache, from which the dropped rows are hidden."""
    model, _ = stock(name)
    layers = model.model.language_model.layers
    if name == "llava":
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        batch = {**batch, "position_ids": positions}
    with hiding(layers, batch["attention_mask"], chosen, None, prompt), torch.no_grad():
        return model(**batch, use_cache=False).logits


def grown(batch: dict[str, Any], token: torch.Tensor) -> dict[str, Any]:
    """The batch with one more token a row."""
    added = {
        "input_ids": token,
        "attention_mask": torch.ones_like(token),
        "mm_token_type_ids": torch.zeros_like(token).int(),
    }
    return {key: torch.cat((value, added[key]), 1) if key in added else value for key, value in batch.items()}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_generation_is_that_of_the_stock_model_without_the_dropped_rows(name, config):
    model, batch = stock(name)
    harden(model, CONFIGS[config])
    with hf_hardattn.record(model) as recording:
        found = write(model, batch)
    chosen, prompt = kept(recording), batch["input_ids"].shape[1]
    words = (batch["input_ids"] != IMAGE) & batch["attention_mask"].bool()
    for rows in chosen.values():
        assert bool(rows[words].all()) and not bool(rows[0].all())
    text = batch
    for step in range(STEPS):
        logits = oracle(name, text, chosen, prompt)[:, -1]
        allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
        allowed[[SIZES["eos_token_id"], IMAGE, START, END, VIDEO]] = False
        assert_rounded(found.logits[step][:, allowed], logits[:, allowed], SOME)
        token = logits.masked_fill(~allowed, -torch.inf).argmax(-1, keepdim=True)
        assert torch.equal(token[:, 0], found.sequences[:, prompt + step])
        text = grown(text, token)
    static = write(model, batch, cache_implementation="static")
    assert torch.equal(static.sequences, found.sequences)
    beams = [
        write(model, batch, num_beams=2, **options).sequences for options in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_keeping_all_and_a_prompt_of_words_are_the_stock_model(name):
    model, batch = stock(name)
    expected = write(model, batch).sequences
    words = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    alone = write(model, words).sequences
    harden(model, {"sites": ["decoder.inputs", "decoder.tokens.*"], "budget": 1.0})
    assert torch.equal(write(model, batch).sequences, expected)
    harden(model, {"sites": ["decoder.inputs", "decoder.tokens.*"], "budget": 2})
    assert torch.equal(write(model, words).sequences, alone)


@pytest.mark.parametrize("estimator", ["straight_through", "rloo"])
@pytest.mark.parametrize("name", ["llava", "qwen"])
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
        assert all(bool(p.grad.isfinite().all()) and bool(p.grad.abs().max() > 0) for p in selector.parameters())
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
        assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in selector.parameters()), site
    with pytest.raises(HardAttentionError, match="vision.tokens"):
        hf_hardattn.apply(model, {"sites": ["vision.tokens.0"], "budget": 5})


def test_embeddings_alone_are_refused():
    model, batch = stock("llava")
    harden(model, CONFIGS["inputs"])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(HardAttentionError, match="nothing tells at 'decoder.inputs' which rows are an image's"):
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])


def test_verify_knows_that_the_rows_are_made():
    model, batch = stock("llava")
    report = hf_hardattn.verify(harden(model, CONFIGS["inputs"]), batch)
    assert report.parity_ok and "made by the model, not given" in report.sites[0].statement
