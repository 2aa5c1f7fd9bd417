"""Every family of models, each kind of site once: what a row of ``models/`` promises. A few families are tried in full by the other laws."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers
from cases import harden, run
from examples import IMAGE_SIZES, TEXT_SIZES, Example, build, padded_ids
from family_checks import CHECKS, applies, subjects
from rounding import MANY, assert_rounded

import hf_hardattn
from hf_hardattn import HardAttentionError

SUBJECTS = subjects()
CASES = [(name, subject) for subject in SUBJECTS for name in CHECKS if applies(name, subject)]


@pytest.mark.parametrize(("name", "subject"), CASES, ids=[f"{subject}-{name}" for name, subject in CASES])
def test_a_family_keeps_its_promise(name, subject):
    CHECKS[name](subject)


IMAGES = dict(IMAGE_SIZES, num_hidden_layers=2)
WORDS = dict(TEXT_SIZES, num_hidden_layers=2)


def composite(kind):
    """A tiny model made of a ViT and BERTs, and its batch."""
    torch.manual_seed(0)
    ids, mask = padded_ids()
    image, text = transformers.ViTConfig(**IMAGES), transformers.BertConfig(**WORDS)
    reader = transformers.BertConfig(**WORDS, is_decoder=True, add_cross_attention=True)
    images, texts = {"pixel_values": torch.randn(3, 2, 12, 12)}, {"input_ids": ids, "attention_mask": mask}
    if kind == "VisionTextDualEncoder":
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=14)
        return transformers.VisionTextDualEncoderModel(config).eval(), {**images, **texts, "return_loss": True}
    encoder = image if kind == "VisionEncoderDecoder" else text
    cls = getattr(transformers, f"{kind}Model")
    config = cls.config_class.from_encoder_decoder_configs(encoder, reader, decoder_start_token_id=1, pad_token_id=0)
    return cls(config).eval(), {**(images if encoder is image else texts), "labels": torch.randint(2, 53, (3, 5))}


def test_a_model_of_two_encoders_has_the_sites_of_both(tmp_path):
    model, batch = composite("VisionTextDualEncoder")
    harden(model, {"sites": ["vision.inputs", "text.inputs"], "budget": 0.5, "estimator": "reinforce"})
    report = hf_hardattn.verify(model, batch)
    assert report.parity_ok and all(site.certified for site in report.sites)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for s in hf_hardattn.selectors(model).values() for p in s.parameters())
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(Example(again, batch))["logits_per_text"], run(Example(model, batch))["logits_per_text"])


@pytest.mark.parametrize("site", ["vision.inputs", "vision.tokens.0", "vision.self.1"])
def test_blip_2_reads_images_as_blip_does(site):
    """Its image tower is BLIP's, whose reference is a loop."""
    found = []
    for cls in (transformers.Blip2VisionModel, transformers.BlipVisionModel):
        torch.manual_seed(0)
        model = cls(cls.config_class(**dict(IMAGES, num_channels=3, initializer_range=0.3))).eval()
        harden(model, {"sites": [site], "budget": 0.5, "scorer": "linear"})
        if found:
            model.load_state_dict(found[0].state_dict())
        found.append(model)
    batch = {"pixel_values": torch.randn(3, 3, 12, 12)}
    expected, other = (run(Example(model, batch)) for model in found)
    for name in expected:
        assert_rounded(other[name], expected[name], MANY, name)


def test_a_threshold_reaches_the_q_former_while_writing():
    """``generate`` calls the towers one by one, and tells the Q-Former of no rows that are missing."""
    example = build("blip_2", "Blip2ForConditionalGeneration")
    model = example.model.eval()
    harden(model, {"sites": ["vision.tokens.0"], "budget": "top_p:0.6", "scorer": "linear"})
    inputs = {name: value for name, value in example.batch.items() if name != "labels"}
    start = torch.zeros(3, 1, dtype=torch.long)
    with hf_hardattn.record(model) as recording:
        expected = model(**inputs, decoder_input_ids=start).logits[:, -1]
    assert len({int(n) for n in recording[0].mask.sum(-1).flatten()}) > 1, "every row kept as many"
    output = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert_rounded(output.logits[0], expected, MANY, "logits")


@pytest.mark.parametrize(("kind", "tower"), [("EncoderDecoder", "text"), ("VisionEncoderDecoder", "vision")])
def test_an_encoder_whose_reader_counts_its_rows_keeps_them(kind, tower):
    model, batch = composite(kind)
    with pytest.raises(
        HardAttentionError, match=f"no site matches '{tower}.tokens.0' in {kind}Model; it has: '{tower}.self.0'"
    ):
        hf_hardattn.apply(model, {"sites": [f"{tower}.tokens.0"], "budget": 0.5})
    soft = run(Example(model, batch))["logits"]
    harden(model, {"sites": [f"{tower}.self.1"], "budget": 0.5, "estimator": "straight_through"})
    assert hf_hardattn.verify(model, batch).parity_ok
    assert not torch.allclose(run(Example(model, batch))["logits"], soft, atol=1e-6)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for s in hf_hardattn.selectors(model).values() for p in s.parameters())


def test_a_head_that_counts_rows_by_its_mask_keeps_them():
    model = build("siglip2", "Siglip2ForImageClassification").model
    with pytest.raises(
        HardAttentionError, match=r"'vision.tokens.0' in Siglip2ForImageClassification; it has: 'vision.self.0'"
    ):
        hf_hardattn.apply(model, {"sites": ["vision.tokens.0"], "budget": 0.5})


def test_siglip_texts_must_not_end_in_padding():
    example = build("siglip", "SiglipTextModel")
    harden(example.model.eval(), {"sites": ["text.tokens.0"], "budget": 0.5})
    mask = torch.ones_like(example.batch["input_ids"])
    mask[1, 7:] = 0
    with pytest.raises(HardAttentionError, match="attention_mask hides the last position of a text"):
        example.model(**example.batch, attention_mask=mask)


def test_a_window_counted_in_rows_is_refused():
    example = build("modernbert", "ModernBertModel")
    harden(example.model.eval(), {"sites": ["text.inputs"], "budget": 3})
    example.model.config._attn_implementation_internal = "flash_attention_2"  # its setter asks for the package
    with pytest.raises(
        HardAttentionError,
        match="'flash_attention_2' is not supported at sites of 'text', whose layers have a sliding window",
    ):
        example.model(**example.batch)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "roberta", "xlm_roberta"])
def test_no_head_of_a_text_encoder_predicts_for_fewer_rows(family):
    """Every head that Transformers has for the family, whether the family's row names it or not."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    heads = [name for name in module.__all__ if "For" in name or name.endswith("LMHeadModel")]
    for head in heads:
        example = build(family, head, **({"num_labels": 2} if head.endswith("ForQuestionAnswering") else {}))
        batch = {name: example.batch[name] for name in ("input_ids", "attention_mask")}
        if head.endswith("ForMultipleChoice"):
            batch = {name: torch.stack([value, value], 1) for name, value in batch.items()}
        model = example.model.eval()
        with torch.no_grad():
            expected = predictions(model(**batch))
            assert (
                expected and predictions(harden(model, {"sites": ["text.tokens.0"], "budget": 3})(**batch)) == expected
            )
    assert len(heads) > 3


def predictions(output):
    return {name: value.shape for name, value in output.items() if name.endswith("logits")}
