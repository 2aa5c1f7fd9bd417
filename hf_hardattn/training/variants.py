"""Train matched hard, soft and random-selection models, and collect the data of the model card."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..efficiency.counting import count_flops, count_training_flops
from ..efficiency.energy import metered, total
from ..efficiency.timing import interleaved_seconds, speedups
from ..inspection.audit import CAUTION, Finding, audit, border_groups, position_groups
from ..inspection.dataset_audit import kept_and_free
from ..inspection.verify import verify
from ..recording import record, selectors
from . import tasks
from .fitting import fit
from .results import sha256

NAMES = ("soft", "hard", "random")
MOST_GROUPS = 30
OnStep = Callable[[str, int, int, float], None]


def run(
    task_name: str,
    task_options: dict[str, Any],
    recipe: tasks.Recipe,
    hard_attention: Mapping[str, Any],
    seed: int,
    output: Path,
    on_step: OnStep = lambda name, step, steps, loss: None,
) -> tuple[dict[str, Any], dict[str, PreTrainedModel]]:
    """Train a soft base checkpoint and, from it, a soft, a hard and a random model for the same number of steps; save and measure them.

    Args:
        hard_attention: the argument ``hard_attention`` of ``from_pretrained`` for ``hard`` and for ``random``.
        output: folder that the models are saved in.
        on_step: called with the name of the model, the step, the number of steps, and the loss.

    Returns:
        JSON (``models``, ``found``, ``subgroups``, ``audit``, ``certificate``, ``reload``, ``training``, ``hashes``, ``measured``,
        ``versions``), and the models by name.
    """
    task = tasks.load(task_name, task_options)
    cost, models = {}, {}
    for name in ("base", *NAMES):
        given = None if name in ("base", "soft") else hard_attention[name]
        models[name], cost[name] = _train(task, recipe, name, given, seed, output, on_step)
    del models["base"]
    hard, inputs = models["hard"], next(task.test()).inputs
    tested = {name: task.evaluate(model) for name, model in models.items()}
    if not hard.config.is_encoder_decoder:  # an encoder-decoder needs the labels as decoder inputs
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    checked = {name: value[:32] for name, value in inputs.items()}
    own = [cost["base"], cost["hard"]]  # cost of this checkpoint; the other two models are only for comparison
    rows, measured = _inference(models, {name: value[:64] for name, value in inputs.items()})
    groups, findings = _subgroups(task, models)
    results = {
        "models": {
            name: {"train_seconds": cost[name]["seconds"], task.metric: tested[name][task.metric], **rows[name]}
            | {"kept": tested[name].get("kept", 1.0)}
            for name in NAMES
        },
        "found": tested["hard"].get("recall"),
        "test_examples": sum(len(task.references(batch.inputs)) for batch in task.test()),
        "subgroups": groups,
        "audit": {"findings": [finding.to_dict() for finding in findings], "caution": CAUTION},
        "certificate": verify(hard, checked).to_dict(),
        "reload": _reload(output / "hard", task_name, task_options, tested["hard"][task.metric]),
        "training": {
            "parameters": sum(p.numel() for p in hard.parameters()),
            "selector_parameters": sum(p.numel() for s in selectors(hard).values() for p in s.parameters()),
            "flop": sum(part["flop"] for part in own),
            "seconds": sum(part["seconds"] for part in own),
            "energy": total([part["energy"] for part in own]),
        },
        "hashes": {"hard/model.safetensors": sha256(output / "hard" / "model.safetensors")},
        "measured": measured,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return results, models


def _train(
    task: tasks.Base, recipe: tasks.Recipe, name: str, hard_attention: Any, seed: int, output: Path, on_step: OnStep
) -> tuple[PreTrainedModel, dict[str, Any]]:
    branch = name != "base"
    steps = recipe.branch_steps if branch else recipe.trunk_steps
    torch.manual_seed(seed + branch)
    if branch:
        model = task.model_class.from_pretrained(output / "base", hard_attention=hard_attention)
    else:
        model = task.model_class(task.config())
    started = time.perf_counter()
    with metered() as energy:
        fit(
            model,
            task,
            recipe,
            seed=seed + 1000 * branch,
            branch=branch,
            on_step=lambda step, loss: on_step(name, step, steps, loss),
        )
    seconds = time.perf_counter() - started
    batch = task.draw(recipe.batch, torch.Generator().manual_seed(seed))
    flop = count_training_flops(model, batch, steps)
    model.save_pretrained(output / name)
    return model.eval(), {"seconds": seconds, "flop": flop, "energy": energy}


def _inference(
    models: Mapping[str, PreTrainedModel], inputs: dict[str, Tensor]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return the counted and measured cost of inference by name of the model, and the conditions of the measurement."""

    def call(model: PreTrainedModel) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    size = len(next(iter(inputs.values())))
    seconds = interleaved_seconds({name: partial(call, models[name]) for name in NAMES}, rounds=31)
    ratios = speedups(seconds, "soft")
    rows = {
        name: {
            "gflops": count_flops(models[name], {key: value[:1] for key, value in inputs.items()}) / 1e9,
            "images_per_second": size / statistics.median(seconds[name]),
            "speedup": ratios[name],
        }
        for name in NAMES
    }
    return rows, {
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "batch": size,
        "dtype": "float32",
        "rounds": len(seconds["soft"]),
    }


@torch.no_grad()
def _subgroups(task: tasks.Base, models: Mapping[str, PreTrainedModel]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Return the metric of each label for hard and soft, and the positions that the hard model keeps or drops systematically."""
    hard = models["hard"]
    site = next(iter(selectors(hard)))
    predictions: dict[str, list[Any]] = {"hard": [], "soft": []}
    truth: list[Any] = []
    kept, free, gold = [], [], []
    for batch in task.test():
        for name in predictions:
            predictions[name] += task.predict(models[name], batch.inputs)
        truth += task.references(batch.inputs)
        with record(hard) as recording:
            hard(**batch.inputs)
        one, other = kept_and_free(hard, batch.inputs, recording, site)
        kept.append(one)
        free.append(other)
        if batch.gold is not None:
            gold.append(batch.gold[:, 0])
    labels: dict[Any, Any] = hard.config.id2label or {}
    names = {label: str(labels.get(label, label)) for label in sorted(set(truth))}
    if len(names) > MOST_GROUPS or len(truth) != sum(map(len, kept)):
        return [], []  # free texts: the task defines no groups
    members = {label: [i for i, other in enumerate(truth) if other == label] for label in names}
    groups = [
        {"group": names[label], "examples": len(rows)}
        | {
            name: task.score([words[i] for i in rows], [label] * len(rows))[task.metric]
            for name, words in predictions.items()
        }
        for label, rows in members.items()
    ]
    places = torch.cat(free)
    columns: dict[str, Any] = {"label": [names[label] for label in truth], "position": position_groups(places)}
    if site.startswith("vision."):
        side = hard.config.image_size // hard.config.patch_size
        columns["region"] = border_groups(places, side, side)
    if gold:
        inside = torch.where(torch.cat(gold), 0, 1).masked_fill(~places, -1)
        columns["place"] = (inside, ["what the answer is about", "everything else"])
    return groups, audit(torch.cat(kept), places, columns)


def _reload(folder: Path, task_name: str, task_options: dict[str, Any], expected: float) -> dict[str, Any]:
    """Load the saved hard model from its folder alone in a new process, and test it again."""
    code = "import sys; from hf_hardattn.training.variants import check; check(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), task_name, json.dumps(task_options)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    metric = tasks.load(task_name, task_options).metric
    return {**answer, f"same_{metric}": answer[metric] == expected}


def check(folder: str, task_name: str, task_options: str) -> None:
    """Entry point of the new process; prints JSON."""
    from ..hub.loading import load

    model, task = load(folder), tasks.load(task_name, json.loads(task_options))
    site = next(iter(selectors(model)))
    with record(model) as selections, torch.no_grad():
        model(**{name: value[:8] for name, value in next(task.test()).inputs.items()})
    selection = selections[site][0]
    always = 0 if selection.protected is None else 1  # CLS or </s> is always kept and not part of the choice
    answer = {task.metric: task.evaluate(model)[task.metric], "patches_kept": selection.slots - always}
    print(json.dumps({**answer, "hard": bool(selectors(model))}))
