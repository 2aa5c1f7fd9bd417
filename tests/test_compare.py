"""Comparisons: complete, resumable, and honest about runs that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import T5ForConditionalGeneration
from typer.testing import CliRunner

from hf_hardattn import selectors
from hf_hardattn.cli import app
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.training.compare_report import cells, markdown, summarise
from hf_hardattn.training.comparison import CONTROLS, Comparison
from hf_hardattn.training.tasks import load

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "scripts/configs/compare").glob("*.yaml"))
TINY = {
    "task": "planted_rationale",
    "task_options": {"length": 12, "slots": 2, "values": 4, "fillers": 10, "test_rows": 20},
    "recipe": {"trunk_steps": 2, "branch_steps": 2, "batch": 4},
    "controls": False,
}


def _write(tmp_path, variants, **changes):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "variants": variants, **changes}, sort_keys=False))
    return [
        "compare",
        "--config",
        str(config),
        "--output",
        str(tmp_path / "r.json"),
        "--folder",
        str(tmp_path / "runs"),
    ]


def _invoke(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(Path(arguments[4]).read_text()), result.output


def test_results_are_complete_and_failed_runs_are_counted(tmp_path):
    variants = {"soft": None, "random": None, "simple": None, "broken": {"sites": ["encoder.tokens.9"]}}
    results, output = _invoke([*_write(tmp_path, variants), "--seeds", "2", "--first-seed", "7"])
    assert results["seeds"] == [7, 8] and len(results["runs"]) == 8
    assert {"command", "versions", "platform", "recipe", "variants", "measured", "metric", "points"} <= results.keys()
    assert results["command"].startswith("hf-hardattn")
    summary = results["summary"]
    assert list(summary) == list(variants) and all(row["runs"] == 2 for row in summary.values())
    assert summary["broken"]["failed"] == 2 and "no site matches 'encoder.tokens.9'" in summary["broken"]["messages"][0]
    assert summary["soft"]["metrics"]["accuracy"]["sd"] is not None and summary["soft"]["seconds"] > 0
    assert summary["simple"]["gflops"] < summary["soft"]["gflops"]
    assert summary["simple"]["metrics"]["precision"]["mean"] >= 0 and summary["simple"]["to_random"]["mean"] is not None
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "failed: broken" in output and "2 of 2" in re.sub(r"\s+", " ", output)
    table = markdown(results)
    assert table.count("\n| ") == 4 and "no site matches" in table and "2 seeds" in table
    for devices, said in ((["cuda"], "on a GPU."), (["cpu", "cuda"], "on 1 CPU thread or a GPU, as each run says.")):
        runs = [{**row, "device": devices[i % len(devices)]} for i, row in enumerate(results["runs"])]
        assert f"seconds {said}" in markdown({**results, "runs": runs})


def test_controls_of_equal_cost_are_run_by_default(tmp_path):
    results, _ = _invoke([*_write(tmp_path, {"simple": None}, controls=True), "--seeds", "1"])
    summary = results["summary"]
    assert list(summary) == ["soft", "random", "static", "downsampled", "simple"]
    assert not any(row["failed"] for name, row in summary.items() if name in CONTROLS)
    assert summary["random"]["gflops"] == pytest.approx(summary["downsampled"]["gflops"], rel=0.1)
    assert summary["downsampled"]["gflops"] < 0.8 * summary["soft"]["gflops"]
    assert "kept" not in summary["downsampled"]["metrics"]


@pytest.mark.parametrize(("ratio", "side"), [(0.25, 4), (0.14, 3), (1.0, 8)])
def test_a_downsampled_image_has_as_many_patches_as_the_budget_keeps(ratio, side):
    task = load("cluttered_digits")
    inputs = task.reduced({"pixel_values": torch.randn(2, 1, 64, 64)}, ratio)
    assert inputs["pixel_values"].shape == (2, 1, 8 * side, 8 * side)
    assert task.model_class(task.config()).eval()(**inputs).logits.shape == (2, 10)


def test_a_killed_comparison_goes_on_where_it_stopped(tmp_path):
    arguments = _write(
        tmp_path, {"soft": None, "simple": None}, recipe={"trunk_steps": 2, "branch_steps": 40, "batch": 4}
    )
    command = [sys.executable, "-c", "from hf_hardattn.cli import main; main()", *arguments, "--seeds", "3"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    runs, deadline = tmp_path / "runs" / "runs", time.monotonic() + 300
    while not list(runs.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert before and not (tmp_path / "r.json").exists()
    results, _ = _invoke([*arguments, "--seeds", "3"])
    assert len(results["runs"]) == 6 and all(row["status"] == "finished" for row in results["runs"])
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert not [path for path in runs.iterdir() if path.suffix != ".json"]


def test_what_changed_is_run_again_and_failed_runs_on_request(tmp_path):
    first = _write(tmp_path, {"soft": None, "simple": None, "broken": {"sites": ["encoder.tokens.9"]}})
    _invoke([*first, "--seeds", "1"])
    runs = tmp_path / "runs" / "runs"
    before = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    second = _write(tmp_path, {"soft": None, "simple": {"budget": 0.5}, "broken": {"sites": ["encoder.tokens.9"]}})
    results, _ = _invoke([*second, "--seeds", "1", "--retry"])
    changed = {path.name for path in runs.iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"simple-0.json", "broken-0.json"}
    assert results["summary"]["simple"]["metrics"]["kept"]["mean"] == pytest.approx(0.5)


def test_jobs_give_what_one_process_gives(tmp_path):
    arguments = _write(tmp_path, {"soft": None, "simple": None})
    alone, _ = _invoke([*arguments, "--seeds", "1"])
    arguments[-1] += "-2"
    together, _ = _invoke([*arguments, "--seeds", "1", "--jobs", "2"])
    assert [row["metrics"] for row in alone["runs"]] == [row["metrics"] for row in together["runs"]]


def test_one_base_checkpoint_may_serve_all_seeds_and_models_are_kept_on_request(tmp_path):
    arguments = [*_write(tmp_path, {"soft": None, "simple": None}, trunk_seed=7), "--seeds", "2", "--save"]
    results, _ = _invoke(arguments)
    assert all(row["status"] == "finished" and row["spec"]["trunk_seed"] == 7 for row in results["runs"])
    assert [path.name for path in (tmp_path / "runs" / "base_checkpoints").iterdir()] == ["seed-7"]
    models = {path.name for path in (tmp_path / "runs" / "models").iterdir()}
    assert models == {"soft-0", "soft-1", "simple-0", "simple-1"}
    reloaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "runs" / "models" / "simple-1")
    assert reloaded.config.hard_attention["estimator"] == "simple" and selectors(reloaded)


def _row(variant, seed, accuracy, fields=None, **changes):
    row = {
        "variant": variant,
        "seed": seed,
        "status": "finished",
        "metrics": {"accuracy": accuracy},
        "gflops": 1.0,
        "seconds": {"train": 2.0},
        "spec": {"hard_attention": fields},
    }
    return {**row, **changes}


def test_a_choice_no_better_than_a_random_one_is_collapsed():
    site = {"sites": ["vision.inputs"], "budget": {"start": 1.0, "end": 0.25, "steps": 0.4}}
    ours, control = {**site, "scorer": "conv"}, {**site, "scorer": "random", "budget": 0.25}
    rows = [
        *(_row("soft", seed, 0.9) for seed in (0, 1)),
        *(_row("random", seed, 0.4, control) for seed in (0, 1)),
        *(_row("static", seed, 0.4, {**site, "scorer": "static"}) for seed in (0, 1)),
        _row("simple", 0, 0.41, ours),
        _row("simple", 1, 0.85, ours),
        _row("elsewhere", 0, 0.4, {**ours, "budget": 0.5}),
        {
            "variant": "elsewhere",
            "seed": 1,
            "status": "failed",
            "message": "Diverged: nan",
            "spec": {"hard_attention": ours},
        },
    ]
    summary = summarise(rows, "accuracy", 100.0)
    assert summary["simple"]["failed"] == 1 and "seed 0: collapsed, +1.0 points" in summary["simple"]["messages"][0]
    assert summary["simple"]["metrics"]["accuracy"]["mean"] == pytest.approx(0.63)  # collapsed runs count in the mean
    assert summary["simple"]["to_soft"] == pytest.approx({"mean": -27.0, "sd": 31.112698}, rel=1e-5)
    assert summary["static"]["failed"] == summary["random"]["failed"] == 0  # controls are not judged
    assert summary["elsewhere"]["messages"] == ["seed 1: Diverged: nan"]  # no random choice of as much to compare with
    assert summary["elsewhere"]["metrics"]["accuracy"] == {"mean": 0.4, "sd": None}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_hold_what_a_comparison_needs(path):
    comparison = Comparison.read(path)
    _, recipe, variants = comparison.settle()
    assert recipe.trunk_steps >= recipe.branch_steps >= 100
    if comparison.controls is False:
        return  # a curve of its own script, which has its own
    assert "soft" in variants and any((fields or {}).get("scorer") == "random" for fields in variants.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "cluttered_digit"}, "unknown task 'cluttered_digit'"),
        ({"variants": None}, "has no variants"),
        ({"varaints": {}}, "unknown key 'varaints'.*Did you mean 'variants'"),
        ({"recipe": {"steps": 3}}, "unknown key of recipe: 'steps'"),
        ({"variants": {"half": {"reduce": 1.5}}}, "variant 'half' is {'reduce': 1.5}; .*a number in \\(0, 1\\]"),
        ({"variants": {"half": {"reduce": 0.5, "budget": 0.5}}}, "and no other setting"),
        (
            {"task": "associative_recall", "task_options": {}, "variants": {"half": {"reduce": 0.5}}},
            "cannot be reduced",
        ),
        ({"variants": {"simpel": None}}, "unknown variant without fields: 'simpel'.*Did you mean 'simple'"),
        ({"variants": {"x": {"estimator": "simpel"}}}, "unknown estimator 'simpel'"),
        ({"variants": {"x": {"budget": 1.5}}}, "budget=1.5|1.5"),
    ],
)
def test_a_wrong_configuration_raises_before_anything_runs(tmp_path, changes, message):
    arguments = _write(tmp_path, **{"variants": {"soft": None}, **changes})
    with pytest.raises(HardAttentionError, match=message):
        Comparison.read(Path(arguments[2])).settle()


def test_wrong_names_on_the_command_line_raise(tmp_path):
    with pytest.raises(HardAttentionError, match="is not a file"):
        Comparison.read(tmp_path / "none.yaml")
    comparison = Comparison("planted_rationale", dict.fromkeys(CONTROLS))
    with pytest.raises(HardAttentionError, match="unknown variant 'sotf'.*Did you mean 'soft'"):
        comparison.only(["sotf"])
    assert list(comparison.only(["soft"]).variants) == ["soft"] and comparison.only(None) is comparison


def test_the_table_leaves_no_failure_out():
    results = {"metric": "accuracy", "points": 100.0, "summary": {}}
    results["summary"]["dead"] = summarise(
        [{"variant": "dead", "seed": 0, "status": "failed", "message": "Diverged", "spec": {"hard_attention": {}}}],
        "accuracy",
        100.0,
    )["dead"]
    header, (row,) = cells(results)
    assert row[header.index("failed")] == "1 of 1" and row[header.index("accuracy")] == ""
