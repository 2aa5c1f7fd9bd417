"""Train and test the variants of a comparison with the same data, budget, steps and seeds for every way to select, and for full attention.

A soft base checkpoint is trained once for each seed (or once for all seeds); every variant starts from it and trains for the same number
of steps. Each finished run is saved to a file, so an interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import transformers
from tqdm.auto import tqdm

from ..devices import default_device
from ..efficiency.counting import count_flops
from . import tasks
from .comparison import REDUCE, Comparison
from .fitting import fit
from .results import write_json
from .tasks._reduced import Reduced

BASE_FIELDS = ("trunk_steps", "batch", "learning_rate", "weight_decay", "trunk_warmup", "ramp")


def compare(
    comparison: Comparison,
    seeds: list[int],
    folder: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    quick: bool = False,
    retry: bool = False,
    save: bool = False,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train the variants and seeds that are not trained yet, and return a row for each.

    Args:
        folder: folder for base checkpoints and runs; those of the same comparison that it already holds are not repeated.
        jobs: number of processes. threads: PyTorch threads per process.
        quick: run only a few steps and one test batch.
        retry: repeat failed runs.
        save: save each model trained by this call under ``models`` in ``folder``.
        on_row: called with each row as soon as it is available.

    Returns:
        Rows with ``variant``, ``seed`` and ``status``, in the order of variants and seeds. Rows with status ``finished`` also hold
        ``metrics``, ``gflops``, ``seconds`` and ``losses``; rows with status ``failed`` hold a ``message``.

    Raises:
        HardAttentionError: the comparison names something that does not exist.
    """
    _, recipe, variants = comparison.settle(quick)
    common = {"task": comparison.task, "task_options": comparison.task_options, "quick": quick}
    base = {name: value for name, value in asdict(recipe).items() if name in BASE_FIELDS}
    one = comparison.trunk_seed
    bases = [{**common, "recipe": base, "seed": seed} for seed in (seeds if one is None else [one])]
    shared = {} if one is None else {"trunk_seed": one}
    runs = [
        {**common, **shared, "recipe": asdict(recipe), "seed": seed, "variant": name, "hard_attention": fields}
        for seed in seeds
        for name, fields in variants.items()
    ]
    if retry:
        for spec in runs:
            path = run_path(spec, folder)
            if _read(path).get("status") == "failed":
                path.unlink()
    for _ in _each(train_base, bases, folder, jobs, threads):
        pass
    rows = {}
    for row in _each(partial(train_branch, save=save), runs, folder, jobs, threads):
        rows[row["variant"], row["seed"]] = row
        on_row(row)
    return [rows[name, seed] for name in variants for seed in seeds]


def train_base(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train and save the soft model of a seed unless it exists already."""
    place = base_folder(spec, folder)
    path = place / "base.json"
    row = _read(path)
    if row.get("spec") == spec:
        return row
    path.unlink(missing_ok=True)
    task, recipe = tasks.load(spec["task"], spec["task_options"]), _recipe(spec)
    started, processor = time.perf_counter(), time.process_time()
    torch.manual_seed(spec["seed"])
    model = task.model_class(task.config()).to(default_device())  # type: ignore[arg-type]  # Transformers wraps it
    with _bar("base checkpoint", recipe.trunk_steps) as on_step:
        losses = fit(model, task, recipe, seed=spec["seed"], branch=False, on_step=on_step)
    model.save_pretrained(place)
    seconds = {"train": time.perf_counter() - started, "processor": time.process_time() - processor}
    row = {"spec": spec, "seconds": seconds, "losses": _thin(losses)}
    write_json(path, row)  # written last: it marks the checkpoint as complete
    return row


def train_branch(spec: dict[str, Any], folder: Path, save: bool = False) -> dict[str, Any]:
    """Train a variant from its seed's base checkpoint and test it, unless that is done; a run that raises becomes a failed row."""
    path = run_path(spec, folder)
    row = _read(path)
    if row.get("spec") == spec:
        return row
    row = {"variant": spec["variant"], "seed": spec["seed"], "spec": spec}
    try:
        row |= {"status": "finished", **_measure(spec, folder, save)}
    except Exception as error:
        row |= {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    write_json(path, row)
    return row


def _measure(spec: dict[str, Any], folder: Path, save: bool) -> dict[str, Any]:
    task: Any = tasks.load(spec["task"], spec["task_options"])
    recipe, hard_attention = _recipe(spec), spec["hard_attention"]
    if hard_attention is not None and REDUCE in hard_attention:
        task, hard_attention = Reduced(task, hard_attention[REDUCE]), None
    torch.manual_seed(spec["seed"] + 1)
    model = task.model_class.from_pretrained(base_folder(spec, folder), hard_attention=hard_attention)
    model.to(default_device())
    started, processor = time.perf_counter(), time.process_time()
    with _bar(spec["variant"], recipe.branch_steps) as on_step:
        losses = fit(model, task, recipe, seed=spec["seed"] + 1000, branch=True, on_step=on_step)
    trained, processor = time.perf_counter(), time.process_time() - processor
    if save:
        place = folder / "models" / run_path(spec, folder).stem
        model.save_pretrained(place)
        if (tokenizer := task.processor()) is not None:
            tokenizer.save_pretrained(place)
    metrics = task.evaluate(model, batches=1 if spec["quick"] else None)
    first = next(task.test()).to(model.device).inputs
    inputs = {name: c[:32] if isinstance(c, torch.Tensor) else c for name, c in first.items()}
    return {
        "metrics": metrics,
        "gflops": count_flops(model, inputs) / 1e9 / len(next(iter(inputs.values()))),
        "seconds": {"train": trained - started, "processor": processor, "test": time.perf_counter() - trained},
        "device": model.device.type,
        "losses": _thin(losses),
    }


def base_folder(spec: dict[str, Any], folder: Path) -> Path:
    """Return the folder of the base checkpoint that a run starts from."""
    return folder / "base_checkpoints" / f"seed-{spec.get('trunk_seed', spec['seed'])}"


def run_path(spec: dict[str, Any], folder: Path) -> Path:
    """Return the file of a run."""
    return folder / "runs" / f"{quote(spec['variant'], safe=' ,=%')}-{spec['seed']}.json"


def _recipe(spec: dict[str, Any]) -> tasks.Recipe:
    return tasks.Recipe(**{"trunk_steps": 0, "branch_steps": 0, **spec["recipe"]})


@contextmanager
def _bar(name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Progress bar of a training on a terminal; disabled in one of several processes, because their lines would mix."""
    with tqdm(total=steps, desc=name, leave=False, disable=True if parent_process() else None) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        yield on_step


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _thin(losses: list[float], points: int = 20) -> list[float]:
    """Mean losses over at most ``points`` equal parts of a training."""
    size = max(1, -(-len(losses) // points))
    return [round(sum(losses[i : i + size]) / len(losses[i : i + size]), 4) for i in range(0, len(losses), size)]


def _each(
    function: Callable[[dict[str, Any], Path], dict[str, Any]],
    specs: list[dict[str, Any]],
    folder: Path,
    jobs: int,
    threads: int,
) -> Iterator[dict[str, Any]]:
    """Call ``function`` on every spec, in this process or in ``jobs`` others, and yield the results as they arrive."""
    specs = json.loads(json.dumps(specs))  # the form in which they are read from a file
    if jobs == 1:
        _prepare(threads)
        for spec in specs:
            yield function(spec, folder)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, (threads,)) as pool:
        try:
            for future in as_completed([pool.submit(function, spec, folder) for spec in specs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()  # fresh selectors are expected here, and files are small
    transformers.utils.logging.disable_progress_bar()
