"""Small local checkpoints and data under the names that the documentation uses, so that its code runs as it stands."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.blip.processing_blip import BlipProcessor

WIDTH = dict(hidden_size=16, num_attention_heads=2, intermediate_size=16)
WORDS = "a the red green dog cat sleeps runs on grass long report says that all is well summarize: translate to German:".split()
DOCUMENT = "the report says that all is well on the long grass a dog runs and a cat sleeps"


def write_all(folder: Path) -> None:
    """Write every checkpoint and data set that the documentation names below ``folder``."""
    torch.manual_seed(0)
    _vit(folder / "google/vit-base-patch16-224")
    _dinov2(folder / "facebook/dinov2-small")
    _t5(folder / "google-t5/t5-small")
    _blip(folder / "Salesforce/blip-image-captioning-base")
    _bert(folder / "sentence-transformers/all-MiniLM-L6-v2")
    _qwen3(folder / "Qwen/Qwen3-0.6B")
    _photos(folder / "photos")
    rows = [f'"{DOCUMENT} {word}","a {word}"' for word in ("dog", "cat", "report", "grass")]
    (folder / "articles.csv").write_text("document,summary\n" + "\n".join(rows) + "\n")


def tokenizer(first: str, last: str) -> PreTrainedTokenizerFast:
    """One token a word, between ``first`` and ``last``."""
    words = ["[PAD]", last, "[UNK]", first, *WORDS]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(first, 3), (last, 1)]
    single = f"$A {last}" if first == "[BOS]" else f"{first} $A {last}"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        eos_token=last,
        unk_token="[UNK]",
        bos_token=first,
        cls_token=first,
        sep_token=last,
        model_max_length=64,
    )


def _vit(folder: Path) -> None:
    config = ViTConfig(**WIDTH, num_hidden_layers=10, image_size=32, patch_size=8, num_labels=5)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def _dinov2(folder: Path) -> None:
    config = Dinov2Config(
        hidden_size=16, num_attention_heads=2, mlp_ratio=1, num_hidden_layers=10, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(folder)


def _t5(folder: Path) -> None:
    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=1))
    model.generation_config.max_length = 20  # as the published checkpoint has it
    model.save_pretrained(folder)
    tokenizer("[BOS]", "</s>").save_pretrained(folder)


def _blip(folder: Path) -> None:
    text = dict(**WIDTH, vocab_size=40, num_hidden_layers=2, encoder_hidden_size=16)
    text |= dict(bos_token_id=3, eos_token_id=1, sep_token_id=1, pad_token_id=0)
    vision = dict(**WIDTH, num_hidden_layers=4, image_size=32, patch_size=8)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer("[BOS]", "[SEP]"))
    processor.save_pretrained(folder)


def _bert(folder: Path) -> None:
    BertModel(BertConfig(**WIDTH, vocab_size=40, num_hidden_layers=6)).save_pretrained(folder)
    tokenizer("[CLS]", "[SEP]").save_pretrained(folder)


def _qwen3(folder: Path) -> None:
    sizes = dict(**WIDTH, vocab_size=40, num_hidden_layers=6, num_key_value_heads=1, head_dim=8)
    Qwen3ForCausalLM(Qwen3Config(**sizes, bos_token_id=3, eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    tokenizer("[BOS]", "</s>").save_pretrained(folder)


def _photos(folder: Path) -> None:
    """Two classes with four images each, told apart by their colour."""
    for name, colour in (("cats", (200, 120, 40)), ("dogs", (40, 120, 200))):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (40, 36), tuple(value + index for value in colour)).save(folder / name / f"{index}.png")
