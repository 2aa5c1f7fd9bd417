"""The audit finds what is planted, says so in plain words, and stays silent about noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.cli import app
from hf_hardattn.inspection.audit import (
    audit,
    border_groups,
    length_groups,
    position_groups,
    rarity_groups,
    size_groups,
)
from hf_hardattn.inspection.dataset_audit import audit_rows
from hf_hardattn.inspection.model_with_processor import ModelWithProcessor

ROWS, PLACES = 200, 17


def noise(rate: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(ROWS, PLACES, generator=torch.Generator().manual_seed(seed)) < rate


def everywhere() -> torch.Tensor:
    places = torch.ones(ROWS, PLACES, dtype=torch.bool)
    places[:, 0] = False
    return places


def test_a_planted_bias_is_found_and_said() -> None:
    """Rows in one language lose half of what they would keep: their rate, its difference and the sentence say it."""
    places, kept = everywhere(), noise()
    language = ["en" if row % 4 else "gd" for row in range(ROWS)]
    thin = torch.tensor([value == "gd" for value in language])[:, None] & noise(0.5, seed=1)
    kept = kept & ~thin
    first, *_ = found = audit(kept, places, {"language": language, "coin": [row % 3 for row in range(ROWS)]})
    assert {first.value, first.column} <= {"gd", "en", "language"} and first.notable
    scottish = next(f for f in found if f.value == "gd")
    rows = torch.tensor([value == "gd" for value in language])
    assert scottish.rate == pytest.approx(float((kept[rows] & places[rows]).sum(-1).float().mean()) / 16)
    assert scottish.rows == 50 and "less than the rest" in scottish.sentence and "language = gd: " in scottish.sentence
    assert not any(f.notable for f in found if f.column == "coin")
    assert "no different from the rest" in next(f.sentence for f in found if f.column == "coin")


def test_noise_alone_is_rarely_notable() -> None:
    """Bonferroni's bound: over 40 audits of nothing, at most a few findings at the 5 % level of each audit."""
    alarms = 0
    for seed in range(40):
        groups = {"label": [row % 5 for row in range(ROWS)], "position": position_groups(everywhere())}
        alarms += any(f.notable for f in audit(noise(seed=seed), everywhere(), groups))
    assert alarms <= 7  # P(more than 7 of 40 | 5 %) < 0.1 %


def test_groups_of_places() -> None:
    places = everywhere()
    thirds, names = position_groups(places)
    assert names[0] == "first third" and thirds[0].tolist() == [-1] + [0] * 6 + [1] * 5 + [2] * 5
    border, names = border_groups(places, 4, 4)
    inside = [place - 1 for place in range(1, 17) if border[0, place] == 1]
    assert inside == [5, 6, 9, 10] and names == ["border", "inside"]
    for first in (0, 3):  # SigLIP has no CLS, DINOv2 may have registers behind it
        border, _ = border_groups(torch.ones(2, first + 16, dtype=torch.bool), 4, 4)
        assert (border[0] == 1).nonzero().flatten().tolist() == [first + place for place in (5, 6, 9, 10)]
    ids = torch.tensor([[5, 5, 5, 5, 7, 7, 9, 1]])
    kinds, names = rarity_groups(ids, ids != 1)
    assert names[int(kinds[0, 6])] == "rare tokens" and kinds[0, 7] == -1 and kinds[0, 0] == kinds[0, 1]
    assert length_groups(torch.arange(9)[None, :] < torch.tensor([[1], [5], [9]])) == ["short", "medium", "long"]
    objects = torch.zeros(3, 9, dtype=torch.bool)
    objects[0, :1], objects[1, :4], objects[2, :8] = True, True, True
    sizes, names = size_groups(objects, torch.ones_like(objects))
    assert [names[int(sizes[row, 0])] for row in range(3)] == ["small objects", "medium objects", "large objects"]
    assert names[int(sizes[0, 8])] == "background"


def test_position_bias_is_found() -> None:
    kept = noise() & (torch.arange(PLACES) < 7)  # nothing behind the first third
    found = {f.value: f for f in audit(kept, everywhere(), {"position": position_groups(everywhere())})}
    assert found["first third"].notable and found["first third"].rate > 0.2 and found["last third"].rate == 0.0
    assert found["last third"].rows == ROWS and "0.0% kept" in found["last third"].sentence


def test_wrong_columns() -> None:
    with pytest.raises(HardAttentionError, match=r"column 'label' has 3 values for 200 rows"):
        audit(noise(), everywhere(), {"label": [1, 2, 3]})
    with pytest.raises(
        HardAttentionError, match=r"column 'x' has shape \(2, 2\); it must have that of the positions, \(200, 17\)"
    ):
        audit(noise(), everywhere(), {"x": torch.zeros(2, 2, dtype=torch.long)})
    with pytest.raises(HardAttentionError, match=r"kept \(200, 17\) and places \(1, 17\) differ"):
        audit(noise(), everywhere()[:1], {})


def vit(budget: Any = 4, scorer: str = "first") -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    model = ViTForImageClassification(ViTConfig(patch_size=4, num_channels=1, num_labels=2, **sizes)).eval()
    return hf_hardattn.apply(model, {"sites": ["vision.inputs"], "budget": budget, "scorer": scorer})


def images(folder: Path, count: int = 24) -> Path:
    for index in range(count):
        target = folder / ("cat" if index % 2 else "dog")
        target.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(target / f"{index}.png")
    return folder


def test_audit_command(tmp_path: Path) -> None:
    """A model that always keeps the first four patches: position and border bias, by the command, in words and in JSON."""
    vit().save_pretrained(tmp_path / "model")
    folder, output = images(tmp_path / "data"), tmp_path / "audit.json"
    arguments = ["audit", str(tmp_path / "model"), "--data", str(folder), "--by", "label", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    found = {(f["column"], f["value"]): f for f in report["findings"]}
    assert found["position", "first third"]["notable"] and found["position", "last third"]["rate"] == 0.0
    assert found["region", "border"]["rate"] > found["region", "inside"]["rate"]
    assert not found["label", "0"]["notable"]  # both labels keep four of sixteen
    assert "A rate says what is computed on, not why" in result.output.replace("\n", " ")


class Letters:
    """A tokenizer of single letters, ``</s>`` last."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        rows = [[ord(letter) - 95 for letter in text] + [1] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_audit_of_texts_knows_rare_words_and_length() -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    hf_hardattn.apply(model, {"sites": ["encoder.inputs"], "budget": 0.5, "scorer": "first"})
    texts = ["e" * 6 + "abcdq"[row % 5] + "n" * (row % 7) for row in range(30)]
    found = audit_rows(ModelWithProcessor(model, Letters(), "t5"), Dataset.from_dict({"text": texts}), "text", batch=8)
    assert {f.column for f in found} == {"position", "frequency", "length"}
    rates = {f.value: f for f in found}
    assert rates["first third"].notable and rates["rare tokens"].rate < rates["frequent tokens"].rate
    with pytest.raises(HardAttentionError, match="no column 'language' in the data; it has: text"):
        audit_rows(ModelWithProcessor(model, Letters(), "t5"), Dataset.from_dict({"text": texts}), "text", ["language"])
    with pytest.raises(HardAttentionError, match="t5 has no hard-attention sites to audit"):
        audit_rows(
            ModelWithProcessor(hf_hardattn.remove(model), Letters(), "t5"), Dataset.from_dict({"text": texts}), "text"
        )


@pytest.mark.parametrize("registers", [0, 4])
def test_the_border_is_that_of_the_images_that_the_model_reads(registers: int) -> None:
    """A model made for 72 pixels reads 16: its grid is the images', after CLS and any registers."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=72, patch_size=4)
    kind = Dinov2WithRegistersConfig if registers else Dinov2Config
    config = kind(num_channels=1, num_labels=2, **({"num_register_tokens": registers} if registers else {}), **sizes)
    model = AutoModelForImageClassification.from_config(config).eval()
    hf_hardattn.apply(model, {"sites": ["vision.inputs"], "budget": 4, "scorer": "first"})
    rows = Dataset.from_dict({"image": [Image.new("L", (16, 16), shade) for shade in range(0, 240, 10)]})
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    found = {f.value: f for f in audit_rows(ModelWithProcessor(model, processor, "m"), rows, "image")}
    assert (found["border"].places, found["inside"].places) == (24 * 12, 24 * 4)
    assert found["border"].rate == pytest.approx(4 / 12) and found["inside"].rate == 0  # the first four: the top row


def test_a_column_keeps_its_name() -> None:
    rows = Dataset.from_dict(
        {"image": [Image.new("L", (16, 16), s) for s in range(24)], "region": ["north", "south"] * 12}
    )
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    found = audit_rows(ModelWithProcessor(vit(), processor, "m"), rows, "image", by=["region"])
    columns = {(f.column, f.value) for f in found}
    assert {("region", "north"), ("region (computed)", "border")} <= columns
