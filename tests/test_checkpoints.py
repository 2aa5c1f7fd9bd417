"""What stands between a run and its loss: full disks, damaged checkpoints, kills at random moments; and the best model kept."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors import SafetensorError
from transformers import ViTForImageClassification

import hf_hardattn
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.training import checkpoints, publishing
from hf_hardattn.training.fine_tune import fine_tune
from hf_hardattn.training.order import Order, Streamed

SCRIPT = Path(__file__).parents[1] / "scripts" / "research" / "kill_test.py"
spec = importlib.util.spec_from_file_location("kill_test", SCRIPT)
kill_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_test)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reset()


def reset() -> None:
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training that saves after every step; the last ``--output_dir`` counts."""
    return kill_test.prepare(tmp_path_factory.mktemp("run"))


def run(flags: list[str], output: Path, *more: Any) -> dict[str, Any]:
    reset()
    return fine_tune("vit", [*flags, "--output_dir", str(output), *map(str, more)])


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_latest_passes_over_a_damaged_checkpoint_and_a_named_one_is_refused(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(flags, tmp_path, "--max_train_steps", 3, "--checkpoints_total_limit", 5)
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    newest = tmp_path / "checkpoints" / "step_00000003"
    whole = (newest / "optimizer.bin").read_bytes()
    (newest / "optimizer.bin").write_bytes(whole[:100])
    with pytest.raises(HardAttentionError, match=r"step_00000003 is damaged: optimizer.bin has 100 bytes, but .* were"):
        run(flags, tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", newest)
    (newest / "optimizer.bin").write_bytes(b"x" * len(whole))  # as long as it was
    with pytest.raises(HardAttentionError, match=r"is damaged: optimizer.bin has changed since it was written"):
        run(flags, tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", newest)
    checkpoints._seal(newest)  # as if it had been written so: only its reader can tell
    with pytest.raises(HardAttentionError, match=r"step_00000003 cannot be loaded .*it is damaged, or was"):
        run(flags, tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", newest)
    (newest / "files.json").unlink()
    monkeypatch.chdir(tmp_path.parent)  # 'latest' is the output_dir's, whatever the working directory
    with caplog.at_level(logging.INFO):
        run(flags, Path(tmp_path.name), "--max_train_steps", 4, "--checkpoints_total_limit", 5)
    assert "skipping " in caplog.text and "step_00000003: files.json" in caplog.text
    assert "resumed from" in caplog.text and "step_00000002" in caplog.text
    assert names(tmp_path)[-1] == "step_00000004" and checkpoints.damage(newest) is None  # made again on the way


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_what_is_left(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from accelerate import Accelerator

    save_state, calls = Accelerator.save_state, []

    def fill(self: Accelerator, folder: str, **kwargs: Any) -> Any:
        calls.append(folder)
        if len(calls) == 3:
            Path(folder).mkdir(parents=True)
            raise error
        return save_state(self, folder, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", fill)
    with pytest.raises(
        HardAttentionError,
        match=r"the checkpoint of step 3 could not be written to .*the disk or the quota is full.*"
        r"The last complete checkpoint is .*step_00000002\. Free some space .*--resume_from_checkpoint latest",
    ):
        run(flags, tmp_path, "--max_train_steps", 4)
    assert run(flags, tmp_path, "--max_train_steps", 4)["train"]["steps"] == 4
    assert names(tmp_path) == ["step_00000004"]


def test_other_errors_of_a_save_stay_as_they_are(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("accelerate.Accelerator.save_state", fail)
    with pytest.raises(RuntimeError, match="something else"):
        run(flags, tmp_path, "--max_train_steps", 1)


def test_a_model_is_written_in_one_piece(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwriting a model: until the new one is whole, the old one is there and loads."""
    run(flags, tmp_path, "--max_train_steps", 1)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_flush", full)
        with pytest.raises(HardAttentionError, match="the model could not be written to"):
            with checkpoints.written_in_one_piece(tmp_path, "the model") as folder:
                (folder / "model.safetensors").write_bytes(b"half")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    ViTForImageClassification.from_pretrained(tmp_path)
    assert publishing.written_in_one_piece is checkpoints.written_in_one_piece
    run(flags, tmp_path, "--max_train_steps", 2)
    assert (tmp_path / "model.safetensors").read_bytes() != before and not (tmp_path / ".partial").exists()


@pytest.mark.slow
def test_random_kills_leave_a_usable_directory(tmp_path: Path) -> None:
    """A few; ``scripts/research/kill_test.py`` makes as many as one likes."""
    results = kill_test.main(["--kills", "3", "--seed", "1", "--output", str(tmp_path / "kills.json")])
    assert results["kills"] == 3 and json.loads((tmp_path / "kills.json").read_text())["unusable"] == 0


def test_the_best_model_is_kept_and_patience_ends_the_run(flags: list[str], tmp_path: Path) -> None:
    data = flags[flags.index("--train_dir") + 1]
    more = ["--validation_dir", data, "--eval_steps", 1, "--metric_for_best_model", "loss", "--learning_rate", 0.3]
    results = run(flags, tmp_path, *more, "--early_stopping_patience", 2, "--max_train_steps", 12)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert results["train"]["best"] == {"step": best, "metric": "loss", "value": losses[best]}
    assert results["train"]["steps"] == best + 2 == max(losses) < 12
    assert results["metrics"]["hard"]["loss"] == pytest.approx(losses[best], abs=1e-6)  # the model saved is that one
    assert f"best_{best:08d}" in names(tmp_path)
    with pytest.raises(
        HardAttentionError, match="--metric_for_best_model bleu is not measured; available: accuracy, loss"
    ):
        run(flags, tmp_path / "other", *more, "--load_best_model_at_end", "--metric_for_best_model", "bleu")


def test_selectors_alone_train(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = run(flags, tmp_path / "base", "--max_train_steps", 1)
    assert base["data"]["train"]["rows"] == 24 and base["train"]["batch"] == 2
    model = ["--model_name_or_path", tmp_path / "base", "--train_selectors_only", "--learning_rate", 0.1]
    run(flags, tmp_path / "tuned", *model, "--max_train_steps", 2)
    assert "gets the whole model" in caplog.text and "selectors_only=True" in caplog.text
    tuned = hf_hardattn.load(tmp_path / "tuned")
    with pytest.raises(HardAttentionError, match="base .* has hard attention itself.* the full model"):
        hf_hardattn.save(tuned, tmp_path / "few", selectors_only=True, base_model=str(tmp_path / "base"))
    before, after = (
        ViTForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("base", "tuned")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("selector" in name for name in moved)
    with pytest.raises(HardAttentionError, match="--train_selectors_only leaves nothing to train"):
        run(flags, tmp_path / "none", *model, "--scorer", "random")
    with pytest.raises(HardAttentionError, match="--train_selectors_only would leave the LoRA adapters untrained"):
        run(flags, tmp_path / "none", *model, "--use_peft")


def test_validation_examples_are_drawn(flags: list[str], tmp_path: Path) -> None:
    from PIL import Image

    data = flags[flags.index("--train_dir") + 1]
    more = ["--validation_dir", data, "--validation_steps", 2, "--num_validation_examples", 3, "--max_train_steps", 4]
    run(flags, tmp_path, *more, "--no_evaluate_each_epoch")
    pictures = sorted((tmp_path / "validation").iterdir())
    assert [picture.name for picture in pictures] == ["step_00000002.png", "step_00000004.png"]
    assert min(Image.open(pictures[0]).size) > 100


def test_order_and_stream_hold_every_epoch_once_whatever_they_are_cut_into() -> None:
    from datasets import Dataset

    def cut(made: Any, start: int, stop: int) -> list[Any]:
        made.start, made.stop = start, stop
        return list(made)

    order = Order(5, seed=3)
    whole = cut(order, 0, 12)
    assert sorted(whole[:5]) == sorted(whole[5:10]) == [0, 1, 2, 3, 4] and whole[:5] != whole[5:10]
    assert whole == cut(order, 0, 4) + cut(order, 4, 11) + cut(order, 11, 12) and len(order) == 1
    data = Dataset.from_dict({"n": list(range(5))}).to_iterable_dataset().shuffle(seed=3, buffer_size=5)
    stream = Streamed(data)
    rows = [row["n"] for row in cut(stream, 0, 12)]
    assert sorted(rows[:5]) == sorted(rows[5:10]) == [0, 1, 2, 3, 4]
    assert rows[7:] == [row["n"] for row in cut(Streamed(data), 7, 12)]
    assert cut(Streamed(data.filter(lambda row: False)), 0, 3) == []
