"""`save` replaces a folder in one step, and does not leave trained weights behind."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server.models import answer, harden, same, stock, with_adapter
from safetensors.torch import save_file
from tqdm import tqdm

import hf_hardattn
from hf_hardattn.errors import HardAttentionError

FORMS = ["full", "sharded", "selectors", "peft"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    stock().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def hard(form: str, seed: int) -> Any:
    """A hard model on the same base; its selectors are those of ``seed``."""
    model = harden(stock())
    model = with_adapter(model) if form == "peft" else model
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "selector" in name:
                parameter.normal_()
    return model


def save(model: Any, folder: Path, form: str, base: Path) -> None:
    if form == "full":
        hf_hardattn.save(model, folder)
    elif form == "sharded":
        hf_hardattn.save(model, folder, max_shard_size="20KB")
    else:
        hf_hardattn.save(model, folder, selectors_only=form == "selectors", base_model=str(base))


@pytest.mark.parametrize("form", FORMS)
def test_a_save_that_is_killed_leaves_a_whole_folder(tmp_path: Path, base: Path, form: str) -> None:
    """Killed at any moment, the folder holds the old model or the new one."""
    folder, models = tmp_path / "saved", [hard(form, seed) for seed in (0, 1)]
    expected = [answer(model) for model in models]
    save(models[0], folder, form, base)
    (folder / "notes.txt").write_text("mine")
    moments = random.Random(0)
    for _ in range(12):
        child = os.fork()
        if not child:
            # progress bars share a lock between processes; one killed while it holds that lock would stop its parent for ever
            tqdm.set_lock(threading.RLock())
            while True:
                for model in models:
                    save(model, folder, form, base)
        time.sleep(moments.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = answer(hf_hardattn.load(folder))
        assert same(found, expected[0]) or same(found, expected[1])
        assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_a_save_that_fails_leaves_the_old_folder(
    tmp_path: Path, base: Path, form: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, old, new = tmp_path / "saved", hard(form, 0), hard(form, 1)
    save(old, folder, form, base)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        for name in ("transformers.PreTrainedConfig.save_pretrained", "hf_hardattn.hub.selector_only.save_file"):
            patch.setattr(name, fail)
        expected = HardAttentionError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected, match="its contents are unchanged" if isinstance(error, OSError) else None):
            save(new, folder, form, base)
    assert same(answer(hf_hardattn.load(folder)), answer(old))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "saved"]


def test_what_else_is_in_the_folder_stays(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "saved"
    save(hard("sharded", 0), folder, "sharded", base)
    (folder / "README.md").write_text("# My card")
    (folder / "checkpoints" / "step_1").mkdir(parents=True)
    (folder / "checkpoints" / "step_1" / "model.safetensors").write_bytes(b"x")
    (folder / "log.jsonl").symlink_to("README.md")
    folder.chmod(0o750)
    with (folder / "open.txt").open("w") as file:  # by another program
        save(hard("full", 1), folder, "full", base)
        file.write("written later")
    assert not list(folder.glob("model-*")) and not (folder / "model.safetensors.index.json").exists()
    assert (folder / "README.md").read_text() == "# My card" and (folder / "open.txt").read_text() == "written later"
    assert (folder / "log.jsonl").is_symlink() and (folder / "checkpoints" / "step_1" / "model.safetensors").exists()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert same(answer(hf_hardattn.load(folder)), answer(hard("full", 1)))


@pytest.mark.parametrize("place", [".", "..", "inside"])
def test_the_folder_that_a_shell_stands_in_stays_the_same_folder(
    tmp_path: Path, base: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    (folder / "inside").mkdir(parents=True)
    before = folder.stat().st_ino
    monkeypatch.chdir(folder / "inside" if place == ".." else folder)
    target = {".": Path("."), "..": Path(".."), "inside": Path("inside")}[place]
    save(hard("full", 1), target, "full", base)
    assert same(answer(hf_hardattn.load(target)), answer(hard("full", 1)))
    assert folder.stat().st_ino == before


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, base: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(hard("full", 1), tmp_path / "link", "full", base)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()


@pytest.mark.parametrize("form", ["full", "selectors", "peft"])
def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path, base: Path, form: str) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to("thesis.txt")
    for name in ("thesis.txt", "link"):
        with pytest.raises(HardAttentionError, match="thesis.txt is a file; .* is written to a folder"):
            save(hard(form, 0), tmp_path / name, form, base)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "link", "thesis.txt"]


def test_selectors_alone_of_a_trained_backbone_are_refused(tmp_path: Path, base: Path) -> None:
    model = hard("full", 0)
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1e-3
    with pytest.raises(HardAttentionError, match="selectors_only=True would lose weights"):
        save(model, tmp_path / "saved", "selectors", base)
    assert not (tmp_path / "saved").exists()
    with pytest.warns(UserWarning, match="somebody/else is not on this machine"):
        hf_hardattn.save(model, tmp_path / "saved", selectors_only=True, base_model="somebody/else")
    hf_hardattn.save(model, tmp_path / "saved", selectors_only=True, base_model=str(base), verify_base=False)


def test_selectors_alone_on_a_base_without_its_head_are_refused(tmp_path: Path) -> None:
    model = harden(stock())
    state = {name: tensor for name, tensor in stock().state_dict().items() if not name.startswith("classifier")}
    stock().save_pretrained(tmp_path / "base")
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HardAttentionError, match="lacks 2 tensors"):
        hf_hardattn.save(model, tmp_path / "saved", selectors_only=True, base_model=str(tmp_path / "base"))
