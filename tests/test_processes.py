"""Trainings on one and two gloo CPU processes: equal to each other, and to themselves when they are killed and resumed.

All of them run in one helper process, ``processes/worker.py``, which forks them and pays for the imports once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import hf_hardattn
from hf_hardattn.training import checkpoints
from hf_hardattn.training.interruption import TERMINATED

pytestmark = pytest.mark.multiprocess
WORKER = Path(__file__).parent / "processes" / "worker.py"
# without annealing, whose steps hang on the length of a run: runs of different length are compared here
HARD = {
    name: {"sites": {"vision.inputs": {}}, "budget": 0.5, "estimator": name, "anneal": 0}
    for name in ("gumbel", "reinforce")
}
WHITENED = {**HARD["reinforce"], "baseline_options": {"whiten": True}}
EQUAL = {**HARD, "whitened": WHITENED}
TEXT = {"sites": {"encoder.inputs": {}}, "budget": 0.6, "estimator": "reinforce"}
LAYOUTS = {"one": (1, 16, 1), "accumulated": (1, 8, 2), "two": (2, 8, 1)}  # processes, per device, accumulation
RESUMED = {  # processes, accumulation
    **{(1, 1): HARD["reinforce"], (2, 1): HARD["reinforce"]},
    **{(1, 4): HARD["gumbel"], (2, 4): WHITENED},
}


@dataclass
class Runs:
    """What the trainings left behind. codes: exit codes of each launch, by name."""

    folder: Path
    codes: dict[str, list[int]]

    def losses(self, name: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (self.folder / name / "log.jsonl").read_text().splitlines()]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def kept(self, name: str) -> dict[int, list[tuple[str, list[int]]]]:
        """Step to its examples, each with the positions kept of it, over all processes; after a kill, as the resumed run saw it."""
        found: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
        for file in (self.folder / name).glob("trace_*.jsonl"):
            rows: list[dict[str, Any]] = []
            for row in map(json.loads, file.read_text().splitlines()):
                if rows and row["step"] < rows[-1]["step"]:  # resumed
                    rows = [old for old in rows if old["step"] < row["step"]]
                rows.append(row)
            for row in rows:
                found[row["step"]] += zip(row["examples"], row["kept"], strict=True)
        return {step: sorted(rows) for step, rows in found.items()}


def write_vit(folder: Path) -> None:
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, num_labels=3)
    ViTConfig(image_size=12, patch_size=4, **sizes).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder)


def write_t5(folder: Path) -> None:
    sizes = dict(vocab_size=13, d_model=26, d_kv=6, d_ff=39, num_layers=2, num_decoder_layers=1, num_heads=3)
    special = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0)
    T5Config(**special, **sizes).save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>", *"abcdefghij"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """40 images in three classes, and 24 pairs of texts of many lengths."""
    for i in range(40):
        image = Image.new("RGB", (12, 12), (90 + i, 90, 90))
        image.paste(((200, 30, 30), (30, 200, 30), (30, 30, 200))[i % 3], (4 * (i % 2), 4, 4 * (i % 2) + 8, 12))
        path = folder / "photos" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    rows = [f"{' '.join('abcdefghij'[: 2 + i % 7])},{' '.join('jihgfedcba'[: 1 + i * i % 9])}" for i in range(24)]
    (folder / "texts.csv").write_text("\n".join(["source,target", *rows]) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    write_vit(folder / "vit")
    write_t5(folder / "t5")
    write_data(folder)

    def job(
        name: str, hard: dict[str, Any], size: int, accumulation: int = 1, steps: int = 14, *more: Any
    ) -> list[Any]:
        flags = ["--output_dir", folder / name, "--hard_attention", json.dumps(hard), "--max_train_steps", steps]
        flags += ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation]
        flags += ["--logging_steps", 1, "--learning_rate", 1e-3, "--cache_dir", folder / "cache"]
        flags += ["--lr_scheduler_type", "constant_with_warmup", *more]
        if hard is TEXT:
            return ["train_t5", "--model_name_or_path", folder / "t5", "--train_file", folder / "texts.csv", *flags]
        return ["train_vit", "--model_name_or_path", folder / "vit", "--train_dir", folder / "photos", *flags]

    def equals(processes: int) -> list[list[Any]]:
        chosen = {name: sizes for name, sizes in LAYOUTS.items() if sizes[0] == processes}
        jobs = [job(f"{e}_{n}", EQUAL[e], s, a, 20) for n, (_, s, a) in chosen.items() for e in EQUAL]
        return jobs + [job(f"text_{n}", TEXT, s // 2, a, 5) for n, (_, s, a) in chosen.items()]

    def resumable(name: str, processes: int, accumulation: int, *more: Any) -> list[Any]:
        size = (4 if processes == 1 else 2) if accumulation == 1 else 1
        if accumulation > 1:  # dropout and a schedule besides
            more = (*more, "--config_overrides", "hidden_dropout_prob=0.1", "--num_warmup_steps", 3, "--random_flip")
        return job(name, RESUMED[processes, accumulation], size, accumulation, 14, *more)

    saving = ("--checkpointing_steps", 3, "--checkpoints_total_limit", 1)
    going_on = (*saving, "--resume_from_checkpoint", "latest")
    launches: dict[str, dict[str, Any]] = {}
    for p in (1, 2):
        whole = [resumable(f"whole_{p}_{a}", p, a) for a in (1, 4)]
        launches[f"equal_{p}"] = {"processes": p, "jobs": equals(p) + whole}
        for a in (1, 4):
            launches[f"kill_{p}_{a}"] = {
                **{"processes": p, "jobs": [resumable(f"parts_{p}_{a}", p, a, *saving)], "kill_at": 8}
            }
        launches[f"resume_{p}"] = {
            "processes": p,
            "jobs": [resumable(f"parts_{p}_{a}", p, a, *going_on) for a in (1, 4)],
        }
    launches["terminate"] = {
        **{"processes": 2, "jobs": [resumable("moved", 2, 1, *saving)], "kill_at": 7, "kill": "SIGTERM"}
    }
    launches["move"] = {"processes": 1, "jobs": [resumable("moved", 1, 1, *going_on)]}
    sharded = job("sharded", HARD["gumbel"], 8, 1, 4, "--checkpointing_steps", 2)
    again = job("sharded_again", HARD["gumbel"], 8, 1, 4)
    again += ["--resume_from_checkpoint", folder / "sharded" / "checkpoints" / "step_00000002"]
    launches["sharded"] = {"processes": 2, "fsdp": True, "jobs": [sharded, again]}
    plan = folder / "plan.json"
    plan.write_text(json.dumps(list(launches.values()), default=str))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, WORKER, plan], env=environment, cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = dict(zip(launches, json.loads((folder / "codes.json").read_text()), strict=True))
    for number, (name, found) in enumerate(codes.items()):
        expected = {"kill": -9, "terminate": TERMINATED}.get(name.partition("_")[0], 0)
        logs = "".join(file.read_text()[-2500:] for file in folder.glob(f"plan.{number}.*.log"))
        fine = (
            expected in found if expected == -9 else set(found) == {expected}
        )  # the other may notice before it is killed
        assert fine, f"{name}: {found}\n{logs}"
    return Runs(folder, codes)


@pytest.mark.parametrize("estimator", EQUAL)
@pytest.mark.parametrize("layout", ["accumulated", "two"])
def test_a_step_does_not_depend_on_how_its_batch_is_cut(runs: Runs, estimator: str, layout: str) -> None:
    """1 x 16 = 2 x 8 = two accumulated 8: gradients, 20 losses, examples and selections; the baseline moves by the step.

    Whitened losses are near 10, where 1e-5 is ten units of fp32's last place: of those, two millionths count as equal.
    """
    one, other = f"{estimator}_one", f"{estimator}_{layout}"
    assert len(runs.losses(one)) == 20
    assert runs.losses(other) == pytest.approx(runs.losses(one), abs=1e-5, rel=2e-6)
    assert runs.kept(other) == runs.kept(one) and len(runs.kept(one)[0]) == 16
    first, second = (torch.load(runs.folder / name / "gradients.pt") for name in (one, other))
    assert first.keys() == second.keys() and any("selector" in name for name in first)
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("layout", ["accumulated", "two"])
def test_every_label_counts_the_same_whatever_micro_batch_it_is_in(runs: Runs, layout: str) -> None:
    """Texts of many lengths: the task loss is a mean over all labels of the step, the estimators' terms are over its examples."""
    assert runs.losses(f"text_{layout}") == pytest.approx(runs.losses("text_one"), abs=1e-5)
    assert [len(rows) for rows in runs.kept("text_one").values()] == [8] * 5


@pytest.mark.parametrize(("processes", "accumulation"), RESUMED)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs: Runs, processes: int, accumulation: int) -> None:
    """SIGKILL in step 8, mid-epoch; the checkpoint is of step 6. Same losses, examples and selections to the end."""
    whole, parts = f"whole_{processes}_{accumulation}", f"parts_{processes}_{accumulation}"
    assert list(runs.losses(parts)) == list(range(1, 15))
    assert runs.losses(parts) == pytest.approx(runs.losses(whole), abs=1e-6)
    assert runs.kept(parts) == runs.kept(whole)
    assert [path.name for path in checkpoints.complete(str(runs.folder / parts))] == ["step_00000012"]


def test_sigterm_saves_and_another_number_of_processes_goes_on(runs: Runs) -> None:
    """One of two processes gets SIGTERM: both save step 8 and exit with 143; one process with the same batch takes over."""
    assert runs.codes["terminate"] == [143, 143]
    assert runs.losses("moved") == pytest.approx(runs.losses("whole_1_1"), abs=1e-5)
    assert min(runs.kept("moved")) == 0 and runs.kept("moved") == runs.kept("whole_1_1")


def test_fsdp2_trains_saves_and_reloads_in_one_process(runs: Runs) -> None:
    unsharded, sharded = runs.losses("gumbel_two"), runs.losses("sharded")
    assert sharded == pytest.approx({step: unsharded[step] for step in range(1, 5)}, abs=1e-5)
    assert runs.losses("sharded_again") == pytest.approx({step: sharded[step] for step in (3, 4)}, abs=1e-6)
    for name in ("sharded", "sharded_again"):
        batch, logits = torch.load(runs.folder / name / "logits.pt")
        model = ViTForImageClassification.from_pretrained(runs.folder / name).eval()
        assert list(hf_hardattn.selectors(model)) == ["vision.inputs"]
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, logits, atol=1e-6, rtol=0)
