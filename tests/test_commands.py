"""The commands answer --help at once, tell what is wrong in one line, and overwrite nothing unasked."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_hardattn import cli
from hf_hardattn.cli import app
from hf_hardattn.cli._output import place
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.training import finetuning, flag_help
from hf_hardattn.training.evaluation import folder_of_evaluation
from hf_hardattn.training.fine_tune import refuse_to_overwrite
from hf_hardattn.training.results import write_json
from hf_hardattn.training.sources import _split_folders

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(path.stem for path in (ROOT / "hf_hardattn" / "cli").glob("[a-z]*.py"))


def ours(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['hf-hardattn', *{list(words)!r}]; "
    code += "from hf_hardattn_cli import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    "words",
    [[], ["--help"], ["-h"], ["--version"], *([name, "--help"] for name in COMMANDS), ["train", "vit", "--help"],
     ["train", "t5", "-h"], ["train", "blip", "--task", "visual_question_answering", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_help_does_not_wait_for_pytorch(words: list[str]) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["hf-hardattn", *{words!r}]
from hf_hardattn_cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, 2, None), end.code
assert sys.modules.get("torch") is None and "transformers" not in sys.modules
assert resource.getrusage(resource.RUSAGE_SELF).ru_utime < 1
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf-hardattn" in done.stdout and time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("family", "task"), [(family, task) for task in finetuning.names() for family in finetuning.load(task).families]
)
def test_help_shows_every_flag_of_a_task_once(family: str, task: str) -> None:
    """Read off the source, it says what the dataclass says."""
    cls = finetuning.load(task)
    text = flag_help.show(family, task)
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    fields = {field.name: field for field in dataclasses.fields(cls.Arguments)}
    assert sorted(line.removeprefix("--").removeprefix("no_") for line in lines) == sorted(fields)
    own = {flag.name: flag for flag in flag_help.task_flags(task)}
    for name, flag in own.items():
        field = fields[name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        assert (flag.default, flag.text) == (default, field.metadata["help"])
    found = flag_help.tasks()[task]
    assert (found.families, found.first) == (cls.families, cls.first)
    assert "straight_through" in text and "moving_average" in text and task in text


@pytest.mark.parametrize("name", ["train_vit", "evaluate"])
def test_scripts_show_the_same_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "--output_dir" in done.stdout and "Which model" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "error",
    [
        HardAttentionError("no."),
        ImportError("x needs the package 'y'; install it with: pip install 'hf-hardattn[z]'"),
        ModuleNotFoundError("No module named 'y'"),
        OSError("a/b is not a local folder and is not a valid model identifier\nlisted on 'https://huggingface.co/models'"),
        FileNotFoundError(2, "No such file or directory", "photo.png"),
        PermissionError(13, "Permission denied", "/root"),
        ConnectionError("x" * 10_000),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    text = str(ended.value.code)
    assert text.startswith("error: ") and "\n" not in text and len(text) < 3000
    assert str(error).split()[0][:20] in text
    monkeypatch.setenv("HF_HARDATTN_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main()


def test_errors_of_the_hub_are_one_line(tmp_path: Path) -> None:
    done = ours("explain", str(tmp_path / "nowhere"), "--input", "nope.png", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_an_output_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    wanted, default = tmp_path / "mine.html", tmp_path / "report.html"
    assert place(wanted, default) == wanted and place(None, default) == default
    for path in (wanted, default, tmp_path / "report-2.html"):
        path.write_text("x")
    with pytest.raises(HardAttentionError, match="mine.html' already exists; .* add --overwrite"):
        place(wanted, default)
    assert place(None, default) == tmp_path / "report-3.html"
    assert place(wanted, default, overwrite=True) == wanted and place(None, default, overwrite=True) == default
    (tmp_path / "empty").mkdir()
    assert place(tmp_path / "empty", default) == tmp_path / "empty"


@pytest.mark.parametrize("left", ["results.json", "config.json", "adapter_config.json", "checkpoints"])
def test_a_training_does_not_overwrite_another(tmp_path: Path, left: str) -> None:
    refuse_to_overwrite(tmp_path)
    (tmp_path / left).mkdir()
    with pytest.raises(HardAttentionError, match=f"holds an earlier run .{left}.* --overwrite, or continue it"):
        refuse_to_overwrite(tmp_path)


def test_an_evaluation_never_replaces_the_record_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "vit"
    write_json(model / "results.json", {"train": {"steps": 3}, "metrics": {}})
    assert folder_of_evaluation(model, str(model), by_default=True) == Path("outputs/evaluation/vit")
    assert folder_of_evaluation(model, "me/vit", by_default=True) == Path("outputs/evaluation/me--vit")
    for overwrite in (False, True):
        with pytest.raises(HardAttentionError, match="holds the results of a training run"):
            folder_of_evaluation(model, str(model), by_default=False, overwrite=overwrite)
    write_json(tmp_path / "e" / "results.json", {"metrics": {}})
    with pytest.raises(HardAttentionError, match="holds an earlier evaluation"):
        folder_of_evaluation(tmp_path / "e", str(model), by_default=False)
    assert folder_of_evaluation(tmp_path / "e", str(model), False, overwrite=True) == tmp_path / "e"


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["train", "validation"], "train", "validation"),
        (["train", "val"], "train", "val"),
        (["Train", "Test"], "Train", "Test"),
        (["train", "dev", "test"], "train", "dev"),
        (["training", "eval"], "training", "eval"),
        (["train"], "train", None),
        (["cat", "dog"], "", None),
        (["bus", "car", "train"], "", None),
        (["test", "cat"], "", None),
    ],
)
def test_a_folder_of_splits_is_read_as_splits(
    tmp_path: Path, names: list[str], train: str, validation: str | None
) -> None:
    for name in names:
        (tmp_path / name / "cat").mkdir(parents=True)
    found = _split_folders({"train": tmp_path})
    assert found["train"] == tmp_path / train
    assert found.get("validation") == (validation and tmp_path / validation)
    other = tmp_path / "elsewhere"
    other.mkdir()
    if validation:
        assert _split_folders({"train": tmp_path / names[0], "validation": other})["validation"] == other


def test_splits_that_cannot_be_told_from_classes_are_refused(tmp_path: Path) -> None:
    for name in ("train", "validation", "unlabelled"):
        (tmp_path / name).mkdir()
    with pytest.raises(HardAttentionError, match="holds train, unlabelled, validation: splits and other folders"):
        _split_folders({"train": tmp_path})
    (tmp_path / "unlabelled").rename(tmp_path / "training")
    with pytest.raises(HardAttentionError, match="splits and other folders"):
        _split_folders({"train": tmp_path})


def test_a_folder_without_training_data_is_refused(tmp_path: Path) -> None:
    for name in ("validation", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(HardAttentionError, match="holds the splits test, validation but none to train on"):
        _split_folders({"train": tmp_path})


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output.startswith("hf-hardattn 0.")
