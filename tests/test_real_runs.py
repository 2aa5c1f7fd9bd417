"""The scripts behind results/: runs side by side, their timing, checkpoints for cards, the cost of a recording. Tiny models, few steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from test_finetuning import data, models  # noqa: F401  # fixtures
from test_scripts import run, script
from transformers import ViTConfig, ViTForImageClassification

import hf_hardattn


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts" / "research"))
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def ended(folder: Path, steps: int, seed: int, **metrics: Any) -> None:
    """A run as ``results.json`` tells it."""
    said = {
        "task": "translation",
        "train": {"steps": steps, "batch": 4},
        "metrics": metrics,
        "command": "/a/scripts/train_t5.py --seed 1",
    }
    said |= {"hard_attention": None, "data": {}, "versions": {}, "platform": "here", "device": "cpu"}
    said |= {"arguments": {"seed": seed}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(said))


def test_runs_side_by_side(tmp_path: Path) -> None:
    """Points lost are hard minus soft of the same seed; a target is held by their mean; unequal steps are refused."""
    results = script("finetuning_results")
    for seed, (soft, hard) in enumerate([(20.0, 19.0), (21.0, 21.2)]):
        ended(tmp_path / f"translation_de-soft-{seed}", 30, seed, soft={"bleu": soft, "loss": 1.0})
        kept = {"decoder.cross.0": 0.2, "decoder.cross.1": 0.3}
        ended(
            tmp_path / f"translation_de-hard-{seed}",
            30,
            seed,
            hard={"bleu": hard, "kept_ratio": kept},
            soft={"bleu": 18.0},
        )
    ended(tmp_path / "translation_de-hard-5", 30, 5, hard={"bleu": 0.0, "kept_ratio": kept}, soft={"bleu": 0.0})
    ended(tmp_path / "translation_de-base", 100, 0, soft={"bleu": 15.0})
    found = results.side_by_side("translation_de", tmp_path)
    assert found["hard_minus_soft"]["values"] == pytest.approx([-1.0, 0.2])  # the third seed has no soft run
    assert found["hard_minus_soft"]["mean"] == pytest.approx(-0.4) and found["target"] == {"points": 0.5, "held": True}
    assert found["arms"]["soft"]["bleu"]["mean"] == 20.5 and found["arms"]["soft"]["bleu"]["sd"] == pytest.approx(
        0.5**0.5
    )
    assert found["arms"]["hard"]["kept"]["mean"] == pytest.approx(0.25) and found["steps"] == {
        "trunk": 100,
        "branch": 30,
    }
    assert found["commands"]["soft"] == "python scripts/train_t5.py --seed 1"
    ended(tmp_path / "translation_de-random-0", 31, 0, hard={"bleu": 1.0})
    with pytest.raises(SystemExit, match=r"have \[30, 31\] steps; compare equal ones"):
        results.side_by_side("translation_de", tmp_path)
    with pytest.raises(SystemExit, match="no run under .*summarisation-hard-0"):
        results.side_by_side("summarisation", tmp_path)


@pytest.mark.parametrize(
    ("family", "task", "works"),
    [
        ("vit", "image_classification", {"forward"}),
        ("t5", "translation", {"generate"}),
        ("blip", "image_text_retrieval", {"image tower", "re-ranking"}),
    ],
)
def test_timing_runs_what_was_trained(
    family: str,
    task: str,
    works: set[str],
    models: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hard model and stock with its weights, on the rows of its test data."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    site = {"vit": "vision.inputs", "t5": "decoder.cross.*", "blip": "text.cross.*"}[family]
    run(
        f"train_{family}", "--task", task, "--model_name_or_path", models / family, "--train_file", data / "rows.jsonl",
        *("--validation_file", data / "rows.jsonl", "--cache_dir", data / "cache", "--cpu", "--max_train_steps", 1),
        *("--sites", site, "--budget", 0.5, "--output_dir", tmp_path / "run", *(("--max_target_length", 9) if family != "vit" else ())),
    )  # fmt: skip
    found = script("finetuning_timing").measure(tmp_path / "run", rows=3, rounds=2)
    assert set(found["works"]) == works and found["rounds"] == 2
    assert all(row["seconds"]["hard"] > 0 and row["stock_over_hard"] > 0 for row in found["works"].values())
    assert next(iter(found["shapes"].values()))[0] == 3


def test_checkpoint_is_trained_drawn_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "tiny.yaml"
    options = "{test_images: 40, clutter: 2, layers: 1, heads: 1}"
    config.write_text(
        f"task: cluttered_digits\ntask_options: {options}\nvariants: {{robust: {{recipe: robust}}, random: null}}\n"
    )
    # the fresh process and the many rounds of its timing have tests of their own
    variants = script("train_checkpoint").variants
    monkeypatch.setattr(variants, "_reload", lambda *args: {})
    monkeypatch.setattr(variants, "interleaved_seconds", lambda calls, rounds: {name: [1.0] for name in calls})
    words = [
        "train_checkpoint.py",
        "--name",
        "tiny",
        "--config",
        config,
        "--variant",
        "robust",
        "--seed",
        "5",
        "--quick",
    ]
    words += ["--output_dir", tmp_path / "models", "--results_dir", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    script("train_checkpoint").main()
    found = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert {"soft", "hard", "random"} <= set(found["models"]) and found["certificate"]["sites"]
    assert (tmp_path / "results" / "tiny.png").stat().st_size > 10_000
    words = [
        "explain_checkpoint.py",
        "--name",
        "tiny",
        "--model",
        tmp_path / "models" / "tiny" / "hard",
        "--task",
        found["task"],
    ]
    words += ["--rows", 6, "--shown", 1, "--output_dir", tmp_path / "reports"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    script("explain_checkpoint").main()
    said = json.loads((tmp_path / "reports" / "tiny_faithfulness.json").read_text())
    assert said["all answers"]["rows"] == 6 and "oracle" in said["all answers"]["explanations"]
    assert "<html" in (tmp_path / "reports" / "tiny.html").read_text()


def test_cost_of_a_recording_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("recording_cost")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37)
    model = ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, **sizes)).eval()
    hf_hardattn.apply(model, {"sites": ["vision.inputs", "vision.tokens.0"], "budget": 0.5})
    pixels = module.torch.randn(1, 3, 12, 12)
    monkeypatch.setattr(module, "cases", lambda: iter([("tiny", model, lambda m: m(pixel_values=pixels), 3)]))
    monkeypatch.setattr(sys, "argv", ["recording_cost.py", "--quick", "--output", str(tmp_path / "cost.json")])
    threads = module.torch.get_num_threads()
    module.main()
    module.torch.set_num_threads(threads)
    row = json.loads((tmp_path / "cost.json").read_text())["rows"][0]
    assert row["selections"] == 2 and row["rounds"] == 2 and row["seconds"]["recorded"] > 0
