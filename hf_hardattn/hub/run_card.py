"""The source of a card for one training run: references into its ``results.json``, and fields that are not stated yet."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..amounts import read_amount
from ..budget import is_sampled
from ..errors import HardAttentionError
from .card import SOURCE
from .remote_code import auto_class
from .secrets import redact
from .untrusted import read_json

RESULTS = "results.json"
UNSTATED = "not stated by its author"
NOT_QUALITY = ("loss", "examples", "kept_ratio")
RECIPE = (
    "learning_rate",
    "selector_learning_rate",
    "weight_decay",
    "num_train_epochs",
    "max_train_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "num_warmup_steps",
    "selector_warmup_steps",
    "mixed_precision",
    "seed",
)


def source_for(path: Path, repo_id: str | None = None) -> Path:
    """Return the source of a card: ``path`` itself, or that of the training whose folder or ``results.json`` it is, created if needed.

    Args:
        repo_id: ``user/name`` in the card; by default the repository that the training names, or the name of the folder.

    Raises:
        HardAttentionError: the path is neither a source nor the folder of a training.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name != RESULTS:
        return path
    if not path.exists() or not ((folder / SOURCE).is_file() or (folder / RESULTS).is_file()):
        raise HardAttentionError(
            f"{path} holds neither {SOURCE} nor {RESULTS}; a card is written from the files of a training or evaluation run. Pass its "
            "--output_dir. A model of another Trainer must be evaluated first, into its own folder: scripts/evaluate.py --model_name_or_path "
            f"{path} --output_dir {path}, with your validation data."
        )
    if not (folder / SOURCE).is_file():
        asked = (read_json(folder / RESULTS, str(folder)).get("arguments") or {}).get("hub_model_id")
        name = repo_id or asked or f"your-name/{re.sub('[^A-Za-z0-9._-]', '-', folder.resolve().name)}"
        source = json.dumps(source_of_run(folder, str(name)), indent=2)
        (folder / SOURCE).write_text(source + "\n", encoding="utf-8")
    elif repo_id is not None:
        raise HardAttentionError(
            f"{folder / SOURCE} already states the repository; --repo-id has no effect. Change it there, or remove that file."
        )
    return folder / SOURCE


def source_of_run(folder: Path, repo_id: str) -> dict[str, Any]:
    """Build the source of a card from the output ``folder`` of a training script.

    Fields that only people can fill in (licence, data, uses) are marked as unstated. Complete them in ``source.json`` before others use
    the model; ``hf-hardattn card --check`` lists them.

    Raises:
        HardAttentionError: there are no results, or the model is soft.
    """
    results = read_json(folder / RESULTS, str(folder))
    hard = results.get("hard_attention")
    found = (results.get("metrics") or {}).get("hard") or {}
    metric = next((name for name in found if name not in NOT_QUALITY), None)
    if not hard or metric is None:
        raise HardAttentionError(
            f"{folder / RESULTS} holds no evaluation of a hard model; a card needs one. Pass validation data."
        )
    adapter = (folder / "adapter_config.json").is_file()
    counted, uncounted = "parameters" in results, {"not_measured": "the results do not count them"}
    config = read_json(folder / "config.json", str(folder))
    name, arguments = (config.get("architectures") or ["PreTrainedModel"])[0], results.get("arguments") or {}
    base = next(
        (
            word
            for word in [results.get("model")]
            if isinstance(word, str) and word.count("/") == 1 and word[0] not in "./~"
        ),
        "none",
    )
    return {
        "name": repo_id.rpartition("/")[2],
        "repo_id": repo_id,
        "summary": f"{name} that selects the positions it computes on, trained by hf-hardattn for {results.get('task', 'its task')}.",
        "form": "adapter" if adapter else "full",
        "model_class": name,
        "auto_class": auto_class(name) or "none",
        "pipeline_tag": str(results.get("task", "feature-extraction")).replace("_", "-"),
        "license": "unknown",
        "language": [],
        "tags": [],
        "base": {
            "model": base,
            "revision": str(arguments.get("model_revision") or UNSTATED),
            "relation": "adapter" if adapter else "finetune",
            "license": "unknown" if base != "none" else "none",
        },
        "selection": {
            "scorer": str(hard["scorer"]),
            "estimator": str(hard["estimator"]),
            "inference": "deterministic, by the scores.",
            "always_kept": "CLS, or the end of a T5 row, where a row shares one selection",
            "schedule": _schedule(hard),
            "recipe": {key: _ref("arguments", key) for key in RECIPE if key in arguments},
            "sites": [_site(hard, site) for site in found.get("kept_ratio", {})],
        },
        "task": {
            "type": str(results.get("task", "other")).replace("_", "-"),
            "dataset_type": str(arguments.get("dataset_name") or "own-data"),
            "dataset_name": str(arguments.get("dataset_name") or "own data"),
            "split": str(arguments.get("validation_split") or "validation"),
            "revision": UNSTATED,
            "examples": _ref("metrics", "hard", "examples"),
            "metric_type": metric,
            "metric_name": metric,
            "unit": "plain",
        },
        "runs": [
            {
                "variant": "hard",
                "seed": _ref("arguments", "seed"),
                "status": "completed",
                "value": _ref("metrics", "hard", metric),
            },
            {
                "variant": "soft",
                "seed": _ref("arguments", "seed"),
                "status": "same weights, run soft",
                "value": _ref("metrics", "soft", metric),
            },
            {
                "variant": "random",
                "seed": _ref("arguments", "seed"),
                "status": "not run",
                "value": {"not_measured": "no random selection was trained for comparison"},
            },
        ],
        "efficiency": {"not_measured": "the training script does not time inference; hf-hardattn bench does"},
        "faithfulness": {"not_measured": "run hf_hardattn.verify on your own batch"},
        "subgroups": {"not_measured": "the training script does not measure subgroups"},
        "data": [
            {
                "name": str(arguments.get("dataset_name") or "own data"),
                "source": UNSTATED,
                "licence": UNSTATED,
                "splits": UNSTATED,
                "people": UNSTATED,
            }
        ],
        "uses": {
            "intended": [UNSTATED],
            "out_of_scope": [UNSTATED],
            "limits": ["one run of one seed", "the selection was not audited by subgroup"],
        },
        "external_validation": "none known.",
        "energy": {"not_measured": "the run did not measure energy"},
        "transparency": {
            "parameters": _ref("parameters", "all") if counted else uncounted,
            "selector_parameters": _ref("parameters", "selectors") if counted else uncounted,
            "training_flop": {"not_measured": "the results do not count it"},
            "training_seconds": _ref("train", "seconds") if "train" in results else {"not_measured": "evaluated only"},
        },
        "pictures": [],
        "versions": _ref("versions"),
        "reproduce": {
            "commands": [redact(str(results.get("command", "unknown")))],
            "hashes": _ref("hashes")
            if results.get("hashes")
            else {"not_measured": "the results contain no hashes of the weights"},
        },
    }


def _ref(*parts: str) -> dict[str, str]:
    return {"$ref": f"{RESULTS}#/{'/'.join(part.replace('~', '~0').replace('/', '~1') for part in parts)}"}


def _schedule(hard: dict[str, Any]) -> str:
    """Describe the schedule of the budget in words."""
    budget, anneal = hard["budget"], hard.get("anneal", 0)
    if _is_schedule(budget) or is_sampled(budget):
        return json.dumps(budget)
    return f"a constant target, anneal {json.dumps(anneal)}" if anneal != 0 else "a constant budget"


def _is_schedule(budget: Any) -> bool:
    return isinstance(budget, dict) and "end" in budget


def _site(hard: dict[str, Any], site: str) -> dict[str, Any]:
    """Return a site with its target, from the last pattern that sets a budget for it, and its kept ratio."""
    place: tuple[str, ...] = ("hard_attention", "budget")
    budget = hard["budget"]
    for pattern, overrides in (hard.get("sites") or {}).items():
        if fnmatchcase(site, pattern) and "budget" in overrides:
            place, budget = ("hard_attention", "sites", pattern, "budget"), overrides["budget"]
    if _is_schedule(budget):
        place, budget = (*place, "end"), float(budget["end"])
    elif is_sampled(budget):
        place, budget = (*place, "sample", "0"), float(budget["sample"][0])
    elif isinstance(budget, dict) and "ratio" in budget:
        place, budget = (*place, "ratio"), float(budget["ratio"])
    target = (
        _ref(*place)
        if isinstance(budget, float)
        else {"not_measured": f"a budget of {read_amount(budget, 'budget', site)} positions or by scores has no ratio"}
    )
    return {"site": site, "target": target, "achieved": _ref("metrics", "hard", "kept_ratio", site)}
