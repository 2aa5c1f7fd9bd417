"""The demo runs as a user runs it, and draws what it says."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from hf_hardattn import registry
from hf_hardattn.cli import app
from hf_hardattn.inspection.overlay import patch_overlay
from hf_hardattn.modeling.selection import Selection


def test_demo_quick(tmp_path):
    """A few steps: the table, the certificate, the reload in a fresh process, the picture."""
    result = CliRunner().invoke(app, ["demo", "--quick", "--threads", "1", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["models"]) == {"soft", "hard", "random"}
    assert results["models"]["hard"]["kept"] <= 0.15
    assert results["models"]["hard"]["gflops"] < 0.5 * results["models"]["soft"]["gflops"]
    assert results["reload"] == {
        "accuracy": results["models"]["hard"]["accuracy"],
        "patches_kept": 9,
        "hard": True,
        "same_accuracy": True,
    }
    assert results["certificate"]["parity_ok"] and results["certificate"]["sites"][0]["certified"]
    assert (tmp_path / "kept_patches.png").stat().st_size > 10_000
    assert "images/s" in result.output and "cannot influence" in result.output.replace("\n", " ")


def test_overlay_lights_kept_patches_only():
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    mask[..., [0, 3]] = True  # CLS and the third patch of a 2 x 2 grid
    selection = Selection("vision.inputs", mask, torch.ones_like(mask), None, mask.float(), slots=2)
    figure = patch_overlay(torch.linspace(0, 1, 64).view(1, 1, 8, 8), selection, 4, titles=["three"], columns=1)
    (axis,) = figure.axes
    shown = torch.as_tensor(axis.images[0].get_array())[..., 0]
    assert torch.allclose(shown[4:, :4], torch.linspace(0, 1, 64).view(8, 8)[4:, :4], atol=1e-6)
    assert (shown[:4] > 0.7).all() and (shown[4:, 4:] > 0.7).all()
    assert [frame.get_xy() for frame in axis.patches] == [(-0.5, 3.5)]


def test_list_and_env():
    listed = CliRunner().invoke(app, ["list"]).output
    for kind in registry.KINDS:
        for name in registry.names(kind):
            assert name in listed
    assert json.loads(CliRunner().invoke(app, ["env"]).output)["transformers"].startswith("5.")
