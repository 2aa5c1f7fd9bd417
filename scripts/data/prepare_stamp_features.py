"""Create the data of the task `stamp_captions` of `hf-hardattn compare`: the features of each stamp's patches, and its caption.

    python scripts/data/prepare_stamps.py outputs/stamps --output outputs/data/stamps
    python scripts/data/prepare_weights.py outputs/weights --size 154
    python scripts/data/prepare_stamp_features.py --stamps outputs/data/stamps --vit outputs/weights/vit-s14 --output outputs/data/stamp-features

The features are the last hidden states of a frozen pretrained ViT, as in Show, Attend and Tell, standardised over the training images
(without this, a few large features dominate the others, and the decoder learns many times more slowly). Writes
{train,validation,test}.jsonl with the captions, {...}.safetensors with `features` fp16 [n, patches, D] in the same order, and a tokenizer
of the training captions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from prepare_translation import train_tokenizer
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


@torch.no_grad()
def features(model: ViTModel, processor: ViTImageProcessorPil, paths: list[Path], batch: int = 16) -> torch.Tensor:
    """Return the hidden states of the patches, without CLS, ``[n, patches, D]``."""
    found = []
    for start in tqdm(range(0, len(paths), batch)):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + batch]]
        pixels = processor(images=images, return_tensors="pt").pixel_values
        found.append(model(pixel_values=pixels).last_hidden_state[:, 1:])
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=Path("outputs/data/stamps"))
    parser.add_argument("--vit", type=Path, default=Path("outputs/weights/vit-s14"))
    parser.add_argument("--output", type=Path, default=Path("outputs/data/stamp-features"))
    parser.add_argument("--vocabulary", type=int, default=800)
    arguments = parser.parse_args()
    model = ViTModel.from_pretrained(arguments.vit).eval()
    processor = ViTImageProcessorPil.from_pretrained(arguments.vit)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):  # train first: it determines mean and deviation
        lines = (arguments.stamps / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        found = features(model, processor, [arguments.stamps / row["image"] for row in rows])
        if split == "train":
            tokenizer = train_tokenizer([row["caption"] for row in rows], arguments.vocabulary)
            tokenizer.save(str(arguments.output / "tokenizer.json"))
            mean, deviation = found.mean((0, 1)), found.std((0, 1))
        save_file({"features": ((found - mean) / deviation).half()}, arguments.output / f"{split}.safetensors")
        kept = "".join(json.dumps({"caption": row["caption"]}, ensure_ascii=False) + "\n" for row in rows)
        (arguments.output / f"{split}.jsonl").write_text(kept, encoding="utf-8")
        print(f"{split}: {tuple(found.shape)}")


if __name__ == "__main__":
    main()
