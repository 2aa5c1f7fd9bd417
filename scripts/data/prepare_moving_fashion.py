"""Create videos of real items that move through clutter in known frames, and a tiny BLIP to start from.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb outputs/fashion
    FASHION_MNIST=outputs/fashion/usr/share/datasets/fashion-mnist python scripts/data/prepare_moving_fashion.py

Eight frames of 56x56 pixels show fragments of garments from Fashion-MNIST; in two consecutive frames, one whole garment passes by. The
caption names it, and `planted` lists its frames. Test videos show garments that training never sees. The files are lossless FFV1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import BlipConfig, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip.processing_blip import BlipProcessor

from hf_hardattn.training.mnist import fashion_bank

FRAMES, CANVAS, ITEM, PATCH, PIECES = 8, 56, 28, 14, 6
NAMES = "a t-shirt|trousers|a pullover|a dress|a coat|a sandal|a shirt|a sneaker|a bag|an ankle boot".split("|")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"]


def video(images: Tensor, item: int, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Return frames uint8 ``[F, H, W]``, and the numbers of the frames that show ``images[item]``."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    frames = torch.zeros(FRAMES, CANVAS, CANVAS)
    for frame in frames:
        for _ in range(PIECES):
            other = images[(item + 1 + draw(len(images) - 1)) % len(images)]
            y, x, top, left = (
                draw(ITEM - PATCH + 1),
                draw(ITEM - PATCH + 1),
                draw(CANVAS - PATCH + 1),
                draw(CANVAS - PATCH + 1),
            )
            place = frame[top : top + PATCH, left : left + PATCH]
            place.copy_(torch.maximum(place, other[y : y + PATCH, x : x + PATCH]))
    first, across = draw(FRAMES - 1), draw(2)
    top, left = draw(3), draw(3)
    for step in range(2):  # the item moves by one patch, down or to the right, or back
        y, x = ((top + step) % 3 * PATCH, left * PATCH) if across else (top * PATCH, (left + step) % 3 * PATCH)
        frames[first + step, y : y + ITEM, x : x + ITEM] = images[item]
    return frames.to(torch.uint8), [first, first + 1]


def write(frames: Tensor, path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = CANVAS, CANVAS, "gray"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())


def start(folder: Path, width: int, layers: int) -> None:
    """Save the configuration and the processor of a tiny BLIP whose vocabulary is that of the captions."""
    words = sorted({word for name in NAMES for word in name.replace("-", " - ").split()})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "bos_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    sizes = dict(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 32
    )
    ids = dict(pad_token_id=0, sep_token_id=3, eos_token_id=3, bos_token_id=4)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=16, encoder_hidden_size=width, **ids, **sizes)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    vision = dict(image_size=CANVAS, patch_size=PATCH, initializer_range=0.02, **sizes)
    BlipConfig(text_config=text | quiet, vision_config=vision, image_text_hidden_size=width).save_pretrained(folder)
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False)
    BlipProcessor(BlipImageProcessorPil(size={"height": CANVAS, "width": CANVAS}, **half), tokenizer).save_pretrained(
        folder
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/data/moving-fashion"), help="folder for the rows")
    parser.add_argument("--train", type=int, default=2000, help="training videos (default: 2000)")
    parser.add_argument("--test", type=int, default=300, help="test videos (default: 300)")
    parser.add_argument("--width", type=int, default=64, help="width of the tiny BLIP (default: 64)")
    parser.add_argument("--layers", type=int, default=2, help="layers of each tower (default: 2)")
    arguments = parser.parse_args()
    for seed, (part, count) in enumerate({"train": arguments.train, "test": arguments.test}.items()):
        bank, generator = fashion_bank(part), torch.Generator().manual_seed(seed)
        images = bank.images[0].float()
        (arguments.output / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for i, item in enumerate(
            tqdm(torch.randperm(len(bank.labels), generator=generator)[:count].tolist(), desc=part)
        ):
            frames, planted = video(images, item, generator)
            write(frames, arguments.output / part / f"{i}.mkv")
            rows.append({"video": f"{part}/{i}.mkv", "caption": NAMES[int(bank.labels[item])], "planted": planted})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    start(arguments.output / "blip", arguments.width, arguments.layers)


if __name__ == "__main__":
    main()
