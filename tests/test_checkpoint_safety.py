"""Resuming runs no code, and says what is wrong with a checkpoint, a log or a folder in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import flags, fresh_process, run  # noqa: F401

from hf_hardattn.errors import HardAttentionError
from hf_hardattn.training import checkpoints
from hf_hardattn.training.pickles import check_pickles
from hf_hardattn.training.results import Log


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(path: Path, mark: Path, form: str) -> None:
    if form == "archive":
        torch.save({"state": Evil(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(mark), protocol=int(form)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    run(flags, folder, "--max_train_steps", 2, "--checkpoints_total_limit", 5)
    return folder / "checkpoints" / "step_00000002"


def pickled(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".pkl", ".bin", ".pt"))


@pytest.mark.parametrize("form", ["archive", "0", "2", "4"])
def test_resuming_runs_no_code_of_any_file(
    trained: Path,
    flags: list[str],  # noqa: F811
    tmp_path: Path,
    form: str,
) -> None:
    """A pickle in the place of each file that is one: refused, or passed over, and never run."""
    names = pickled(trained)
    assert {"custom_checkpoint_0.pkl", "custom_checkpoint_2.pkl", "optimizer.bin", "random_states_0.pkl"} <= set(names)
    for name in names:
        whole, mark = (trained / name).read_bytes(), tmp_path / f"ran-{name}"
        plant(trained / name, mark, form)
        checkpoints._seal(trained)
        try:
            run(flags, tmp_path / name, "--max_train_steps", 2, "--resume_from_checkpoint", trained)
            assert name == "random_states_0.pkl"  # not needed: a step's noise depends on its number
        except HardAttentionError as error:
            assert str(trained) in str(error)
        assert not mark.exists()
        (trained / name).write_bytes(whole)
    checkpoints._seal(trained)
    assert run(flags, tmp_path / "whole", "--max_train_steps", 3, "--resume_from_checkpoint", trained)


def test_a_checkpoint_that_the_user_vouches_for_is_loaded(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    plant(tmp_path / "checkpoint" / "custom_checkpoint_0.pkl", tmp_path / "mark", "archive")
    with pytest.raises(HardAttentionError, match="custom_checkpoint_0.pkl .* can run code .* add --trust_checkpoint"):
        check_pickles(tmp_path / "checkpoint")
    check_pickles(tmp_path / "checkpoint", trusted=True)


def test_a_distributed_checkpoint_is_plain_data(tmp_path: Path) -> None:
    """What PyTorch's sharded checkpoints hold passes; the same file with a call in it does not."""
    from torch.distributed import checkpoint

    checkpoint.save({"weight": torch.ones(3), "step": 1}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    check_pickles(tmp_path)
    plant(tmp_path / "sharded" / ".metadata", tmp_path / "mark", "2")
    with pytest.raises(HardAttentionError, match="sharded/.metadata .* it asks for posix.mkdir"):
        check_pickles(tmp_path)


def test_a_flipped_bit_is_noticed_in_every_file(trained: Path) -> None:
    for path in trained.iterdir():
        if path.name == checkpoints.MANIFEST:
            continue
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert checkpoints.damage(trained) == f"{path.name} has changed since it was written"
        path.write_bytes(whole)
    assert checkpoints.damage(trained) is None


@pytest.mark.parametrize(
    "content", [[], "x", 3, None, {"a": "b"}, {"a": None}, {"a": [1]}, {"a": {}}, {"a": {"bytes": "9"}}]
)
def test_a_list_of_files_that_is_none_is_damage(tmp_path: Path, content: Any) -> None:
    (tmp_path / checkpoints.MANIFEST).write_text(json.dumps(content))
    assert checkpoints.damage(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 5000, b"{"])
def test_a_list_of_files_that_cannot_be_read_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / checkpoints.MANIFEST).write_bytes(content)
    assert "missing or unreadable" in str(checkpoints.damage(tmp_path))


def test_checkpoints_of_earlier_versions_are_whole(trained: Path) -> None:
    """They list sizes alone."""
    files = json.loads((trained / checkpoints.MANIFEST).read_text())
    (trained / checkpoints.MANIFEST).write_text(json.dumps({name: noted["bytes"] for name, noted in files.items()}))
    assert checkpoints.damage(trained) is None
    checkpoints._seal(trained)


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[]", b"3", b'"x"', b'{"loss": 1}', b'{"step": "x"}', b"[" * 5000, b"{"]
)
def test_a_damaged_row_of_the_log_is_left_out(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
    Log(path, 2).write({"step": 3, "again": True})
    assert [json.loads(row) for row in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


@pytest.mark.parametrize("place", ["a file", "under a file", "too long", "no name"])
def test_an_impossible_output_dir_is_refused_before_anything_is_read(
    tmp_path: Path,
    flags: list[str],  # noqa: F811
    place: str,
) -> None:
    (tmp_path / "file").write_text("x")
    folder = {"a file": "file", "under a file": "file/run", "too long": "x" * 300, "no name": "a\0b"}[place]
    with pytest.raises(HardAttentionError, match="--output_dir .* is not writable"):
        run(flags, tmp_path / folder)
