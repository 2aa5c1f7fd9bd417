"""Kill a training repeatedly at random moments, and check each time that its output directory is usable.

    python scripts/research/kill_test.py --kills 50 --output results/kills.json

The training saves a checkpoint after every optimizer step, keeps one, and writes its model at the end. Half of the kills occur at any
moment of a process: while it reads its data, builds or resumes, trains, saves, or writes the model. The others are aimed at the save of a
random step, or of the model, and occur up to 0.08 seconds later, during that save, at its end, or in a later step. After each SIGKILL the
directory must hold: a newest checkpoint with all of its files, which is at least as far as the previous one; a log in which only the last
row may be broken; and, if there is a config.json, a model that loads. The killed training is then resumed and killed again. When it
finishes, its checkpoints are removed, and a new training starts in the same directory, where the model remains. The training process is
forked from one that has done the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_hardattn.training import checkpoints
from hf_hardattn.training.fine_tune import fine_tune
from hf_hardattn.training.results import describe_run, write_json

STEPS = 12


def prepare(folder: Path) -> list[str]:
    """Create a tiny model and its data; return the flags of a training."""
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, num_labels=2)
    ViTConfig(image_size=16, patch_size=4, **sizes).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for i in range(24):
        path = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200 * (i % 2), 9 * i, 90)).save(path)
    flags = ["--model_name_or_path", folder / "vit", "--train_dir", folder / "photos", "--cache_dir", folder / "cache"]
    flags += ["--output_dir", folder / "out", "--sites", "vision.inputs", "--budget", 0.5, "--max_train_steps", STEPS]
    flags += ["--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest", "--cpu"]
    return [str(flag) for flag in [*flags, "--logging_steps", 1, "--per_device_train_batch_size", 2]]


def start(flags: list[str], log: Path) -> int:
    """Fork a training process."""
    child = os.fork()
    if child:
        return child
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        torch.set_num_threads(1)
        fine_tune("vit", flags)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def appeared(path: Path, began: float) -> bool:
    """Whether ``path`` was created since ``began``; files left by an earlier kill do not count."""
    try:
        return path.stat().st_ctime > began
    except FileNotFoundError:
        return False


class Aim(NamedTuple):
    """When to kill: ``wait`` seconds after ``due``, which gets the time of the start. last: whether the model itself is being written."""

    due: Callable[[float], bool]
    wait: float
    description: dict[str, Any]
    last: bool = False


def at_a_save(draw: random.Random, output: Path, before: int) -> Aim:
    """Aim at the save of a remaining step, or of the model after the last step."""
    target, wait = min(before + draw.randint(1, 4), STEPS + 1), draw.uniform(0.0, 0.08)
    places, last = output / "checkpoints", target > STEPS
    signs = (output / ".partial" if last else places / f"partial_step_{target:08d}", places / f"step_{target:08d}")
    description = {"aimed_at_step": target, "seconds_later": round(wait, 4)}
    return Aim(lambda began: any(appeared(sign, began) for sign in signs), wait, description, last)


def at_any_moment(draw: random.Random, life: float) -> Aim:
    """Aim at any moment of a lifetime of ``life`` seconds."""
    wait = draw.uniform(0.0, life)
    return Aim(lambda began: True, wait, {"seconds_after_the_start": round(wait, 3)})


def strike(child: int, aim: Aim) -> tuple[bool, int]:
    """Kill ``child``; return whether it had ended by itself, and its status."""
    began, until, ended, status = time.time(), None, 0, 0
    while not ended and (until is None or time.time() < until):
        if until is None and aim.due(began):
            until = time.time() + aim.wait
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return bool(ended), status


def check(output: Path, before: int) -> dict[str, Any]:
    """Return the content of ``output``; raise if it is not usable.

    Args:
        before: step of the newest checkpoint after the previous kill.
    """
    found = checkpoints.complete(str(output))
    step = int(found[-1].name.removeprefix("step_")) if found else 0
    if step < before:
        raise RuntimeError(f"the newest checkpoint is of step {step}; it was {before} before the kill")
    for path in found:
        damage = checkpoints.damage(path)
        if damage is not None:
            raise RuntimeError(f"{path}: {damage}")
        load_file(path / "model.safetensors")
        for file in [*path.glob("*.pkl"), *path.glob("*.bin")]:
            torch.load(file, weights_only=False)
    log = output / "log.jsonl"
    rows = log.read_text().splitlines() if log.exists() else []
    for row in rows[:-1]:
        json.loads(row)
    whole = (output / "config.json").is_file()
    if whole:
        ViTForImageClassification.from_pretrained(output)
    partial = [path.name for path in (output / "checkpoints").glob("partial_*")]
    return {"step": step, "model": whole, "partial": len(partial), "saving": (output / ".partial").is_dir()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags, output = prepare(folder), folder / "out"
        began = time.monotonic()
        _, status = os.waitpid(start(flags, folder / "log"), 0)  # a run that is not killed, for the lifetime
        life = time.monotonic() - began
        if status:
            raise RuntimeError((folder / "log").read_text()[-3000:])
        shutil.rmtree(output)
        finished = before = 0
        while len(kills) < args.kills:
            aim = at_a_save(draw, output, before) if draw.random() < 0.5 else at_any_moment(draw, life)
            ended, status = strike(start(flags, folder / "log"), aim)
            if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                found = check(output, before)
                kills.append({**aim.description, **found})
                before = found["step"]
                if not aim.last:
                    continue
                status = 0
            if os.waitstatus_to_exitcode(status):  # resuming after a kill must never fail
                raise RuntimeError((folder / "log").read_text()[-3000:])
            finished += ended
            check(output, before)
            shutil.rmtree(
                output / "checkpoints", ignore_errors=True
            )  # the model stays, and the next training overwrites it
            before = 0
    results = {
        "kills": len(kills),
        "at_any_moment": sum("seconds_after_the_start" in kill for kill in kills),
        "aimed_at_a_save": sum("aimed_at_step" in kill for kill in kills),
        "unusable": 0,
        "finished_trainings": finished,
        "with_a_checkpoint_half_written_or_half_removed": sum(bool(kill["partial"]) for kill in kills),
        "with_a_half_written_model_still_lying_there": sum(kill["saving"] for kill in kills),
        "each": kills,
        **describe_run(argv),
    }
    if args.output:
        write_json(args.output, results)
    print(json.dumps({name: value for name, value in results.items() if name != "each"}, indent=2))
    return results


if __name__ == "__main__":
    main()
