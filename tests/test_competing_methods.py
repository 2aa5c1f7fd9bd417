"""The methods that the benchmark compares with: against loops written from the papers, and as stock where they spare nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, ViTForImageClassification
from typer.testing import CliRunner

from hf_hardattn import HardAttentionError, apply
from hf_hardattn.cli import app
from hf_hardattn.efficiency import compare_methods
from hf_hardattn.efficiency.competing.evit import EViT
from hf_hardattn.efficiency.competing.tome import ToMe, merge
from hf_hardattn.efficiency.competing.topk_mask import TopKMask
from hf_hardattn.training import tasks


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, num_labels=4)
    config = AutoConfig.for_model("vit", image_size=32, patch_size=8, num_channels=1, initializer_range=0.3, **sizes)
    return ViTForImageClassification(config).eval()


def projected(layer: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values of an image's 17 rows, 3 heads of 8."""
    normed, attention = layer.layernorm_before(hidden)[0], layer.attention
    return [p(normed).view(17, 3, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]


@pytest.mark.parametrize(("method", "nothing"), [(ToMe, 0), (TopKMask, 1.0)])
def test_a_method_that_spares_nothing_is_the_stock_model(method: type, nothing: float) -> None:
    model, pixels = vit(), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            method(model, nothing)(pixel_values=pixels).logits, model(pixel_values=pixels).logits
        )


@pytest.mark.parametrize("r", [1, 3, 5])
def test_merging_is_bipartite_soft_matching(r: int) -> None:
    """Token by token: the r most alike pairs, each of an even place and its nearest odd one, become means weighted by size."""
    torch.manual_seed(r)
    hidden, size, metric = torch.randn(1, 11, 4), torch.randint(1, 4, (1, 11, 1)).float(), torch.randn(1, 11, 6)
    merged, sizes = merge(hidden, size, metric, r)
    nearest = {}
    for even in range(2, 11, 2):  # CLS, at 0, proposes nothing
        likeness = {odd: cosine_similarity(metric[0, even], metric[0, odd], 0).item() for odd in range(1, 11, 2)}
        nearest[even] = max(likeness.items(), key=lambda item: item[1])
    gone = sorted(nearest, key=lambda even: -nearest[even][1])[:r]
    left = {place: [place] for place in range(11) if place not in gone}
    for even in gone:
        left[nearest[even][0]].append(even)
    order = [place for place in left if place % 2 == 0] + [place for place in left if place % 2]
    for row, place in enumerate(order):
        weights = size[0, left[place]]
        torch.testing.assert_close(merged[0, row], (hidden[0, left[place]] * weights).sum(0) / weights.sum())
        assert sizes[0, row].item() == weights.sum().item()
    assert merged.shape[1] == 11 - r and sizes.sum() == size.sum()


def test_evit_keeps_what_cls_attends_to_and_fuses_the_rest() -> None:
    model, pixels = vit(), torch.randn(1, 1, 32, 32)
    layer = model.vit.layers[0]
    with torch.no_grad():
        hidden = model.vit.embeddings(pixels)
        short = EViT(model, 0.25).layer(0, layer, hidden)
        query, key, value = projected(layer, hidden)
        weights = torch.stack([(query[:, h] @ key[:, h].T * 8**-0.5).softmax(-1) for h in range(3)])
        mixed = torch.stack([weights[h] @ value[:, h] for h in range(3)], 1)
        joined = hidden[0] + layer.attention.o_proj(mixed.view(17, 24))
        paid = weights[:, 0, 1:].mean(0)
        order = paid.argsort(descending=True)
        kept, others = 1 + order[:4], order[4:]  # a quarter of 16 patches
        fused = sum(paid[place] * joined[1 + place] for place in others)
        expected = torch.stack([joined[0], *joined[kept], fused])
        torch.testing.assert_close(short[0], expected + layer.mlp(layer.layernorm_after(expected)))


def test_top_k_masking_keeps_k_keys_of_each_query() -> None:
    """Brute force: with all but the k largest logits at minus infinity, head by head and query by query."""
    model, pixels = vit(), torch.randn(1, 1, 32, 32)
    layer = model.vit.layers[0]
    with torch.no_grad():
        hidden = model.vit.embeddings(pixels)
        found = TopKMask(model, 0.3).layer(0, layer, hidden)
        query, key, value = projected(layer, hidden)
        mixed = torch.zeros(17, 3, 8)
        for head in range(3):
            for place in range(17):
                logits = key[:, head] @ query[place, head] * 8**-0.5
                best = logits.argsort(descending=True)[: round(0.3 * 17)]
                mixed[place, head] = logits[best].softmax(0) @ value[best, head]
        joined = hidden + layer.attention.o_proj(mixed.view(1, 17, 24))
        torch.testing.assert_close(found, joined + layer.mlp(layer.layernorm_after(joined)))


def test_competing_methods_run_on_its_trained_models(tmp_path: Path) -> None:
    """Every method, on untrained models in the place of trained ones."""
    task = tasks.load("cluttered_digits", {"test_images": 8})
    torch.manual_seed(0)
    soft = ViTForImageClassification(task.config()).eval()
    soft.save_pretrained(tmp_path / "soft")
    hard = {"sites": ["vision.inputs"], "scorer": "conv", "budget": 9}
    apply(ViTForImageClassification(task.config()), hard).save_pretrained(tmp_path / "hard")
    found = compare_methods.run(tmp_path, task.columns(), batch=4, rounds=1)
    ours = found["ours, vision.inputs keep 0.14"]
    assert {row["weights"] for row in found.values()} == {"soft", "hard"} and ours["weights"] == "hard"
    assert {name.split(" ")[0] for name in found} == {
        "soft",
        "ours,",
        "ours",
        "ToMe",
        "EViT",
        "random",
        "key",
        "per-query",
    }
    masked = found["per-query top-k mask keep 0.14"]["flops"]
    assert masked["executed"] == found["soft"]["flops"]["executed"] > masked["nominal"]  # it saves on paper only
    assert ours["flops"]["executed"] < found["ToMe r=24"]["flops"]["executed"] < found["ToMe r=4"]["flops"]["executed"]
    assert all(0 <= row["accuracy"] <= 1 and row["images_per_second"] > 0 for row in found.values())
    with pytest.raises(HardAttentionError, match="holds no 'soft' and no 'hard' model"):
        compare_methods.run(tmp_path / "nowhere", task.columns(), batch=4, rounds=1)


def test_results_are_named_after_their_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"weights": "soft", "accuracy": 0.5, "images_per_second": 2.0, "peak_bytes": 1}
    row |= {"against_soft": {"median": 1.0, "quartiles": [1.0, 1.0, 1.0]}, "flops": {"executed": 2, "nominal": 1}}
    monkeypatch.setattr(compare_methods, "run", lambda folder, columns, **options: {"soft": row})
    monkeypatch.setattr("hf_hardattn.efficiency.allocator.restart_with_settings", lambda: None)
    flags = [
        "bench",
        "--suite",
        "competing",
        "--task",
        "cluttered_digits_60",
        "--threads",
        "1",
        "--output",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "competing_cluttered_digits_60.json").read_text())["images"] == 2000
    assert "cluttered digits 60" in (tmp_path / "competing_cluttered_digits_60.md").read_text()
