"""The README: its code runs, its numbers come from results/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_code_runs(block, tmp_path, monkeypatch):
    """Each block as written; the Hub's name leads to a small local checkpoint of the same depth."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
        patch_size=8,
        attn_implementation="sdpa",
    )
    ViTForImageClassification(config).save_pretrained("stand-in")
    exec(compile(block.replace("google/vit-base-patch16-224", "stand-in"), "README.md", "exec"), {})
    if "vit-hard" in block:
        again = "import hf_hardattn, sys; from transformers import AutoModelForImageClassification as A; m = A.from_pretrained('vit-hard'); print(hf_hardattn.status(m))"
        shown = subprocess.run([sys.executable, "-c", again], check=True, capture_output=True, text=True).stdout
        assert "vision.tokens.6" in shown and "gathered" in shown


def test_numbers_come_from_results():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "docs" / "render_readme.py"), "--check"], check=True)


def test_pictures_exist():
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).stat().st_size > 10_000
