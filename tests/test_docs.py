"""README and documentation: the code runs and prints what is shown, numbers come from results/, commands and pictures exist."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import typer
from accelerate.state import AcceleratorState, GradientState
from stand_ins import write_all
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.S | re.M)
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
# These run training loops or exporters; a whole run has them, `-m "not slow"` leaves them out.
SLOW = {"deployment.md", "comparing.md", "trainer.md"}
NEEDS = {"ray_data.md": "ray"}  # what a reader of the page has, and this project has no other use for


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    write_all(place)
    return place


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] if p.name in SLOW else [], id=name(p)) for p in WITH_CODE]
)
def test_code_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page, one after the other; a block of text behind one is what it prints."""
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for language, code in FENCED.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(code, name(page), "exec"), scope)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            assert _lines(printed) == _lines(code), f"{name(page)} shows something else than its code prints"
            printed = None


def _lines(text: str) -> list[str]:
    """Lines to compare; rounding errors, such as 1.4e-06, differ between processors."""
    return [re.sub(r"\d(?:\.\d+)?e-\d+", "rounding", line.rstrip()) for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path) -> None:
    """Every ``hf-hardattn`` line of a page names a command and options that exist."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^\s*(hf-hardattn .*)$", text, flags=re.M) + re.findall(r"`(hf-hardattn [^`]*)`", text)
    for line in lines:
        words = shlex.split(line.split(" # ")[0].split("#")[0])
        if len(words) < 2 or words[1] in ("--version", "--help") or "COMMAND" in words:
            continue
        assert words[1] in commands, line
        if words[1] == "train":  # its flags are those of the training scripts, which answer for themselves
            continue
        known = {
            option for parameter in commands[words[1]].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known | {"--help"}]
        assert not unknown, f"{line}: {unknown}"


# Lines that are not run here, and why.
MEASURES = (
    "bench",
    "compare",
)  # take minutes to hours, and bench starts the process anew; test_efficiency.py, test_compare.py
NOT_RUN = {
    "hf-hardattn push digits-hard me/digits-hard --no-dry-run": "uploads; test_hub.py",
    "hf-hardattn train vit --config scripts/configs/vit.yaml --budget 0.3": "downloads its data; test_scripts.py",
    "hf-hardattn explain blip-hard --input photos/cats": "ten seconds; test_explain.py",
    "hf-hardattn train blip --task captioning": "names a command, not its flags; test_scripts.py",
}
# Lines that fail until the reader has done what the page asks for, and what they say.
FAILS = {"hf-hardattn card --check outputs/vit-hard": "license='unknown' states no licence"}


def written_commands() -> list[str]:
    """The ``hf-hardattn`` lines of all pages that say what they work on, in order and each once."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = [line for language, code in FENCED.findall(text) if language == "bash" for line in code.splitlines()]
        lines = [line.split(" #")[0].strip() for line in blocks if line.startswith("hf-hardattn")]
        inline = [" ".join(words.split()) for words in re.findall(r"`(hf-hardattn [^`]*)`", text)]
        complete = [line for line in inline if len(line.split()) > 3 or line.split()[-1] == "sample"]
        lines += [line for line in complete if not any(word.isupper() for word in line.split())]
        found.update(dict.fromkeys(" ".join(line.split()) for line in lines))
    return list(found)


@pytest.mark.slow
def test_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command as it is written, on small models and data under the names that the pages use."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_what_pages_made(folder)
    commands = written_commands()
    assert len(commands) > 15 and not set(NOT_RUN) - set(commands)
    trainings = [line for line in commands if line.startswith("hf-hardattn train")]  # others read what these write
    for line in sorted(commands, key=lambda line: line not in trainings):
        if line in NOT_RUN or line.split()[1] in MEASURES:
            continue
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert bool(result.exit_code) is (line in FAILS), f"{line}: {result.exception!r}\n{result.output[-2000:]}"
        assert FAILS.get(line, "") in result.output and "seem to have been set" not in result.output


def write_what_pages_made(folder: Path) -> None:
    """What the Python code of the pages saves, or what a reader is asked to have."""
    hf_hardattn.save(hf_hardattn.load("sample"), folder / "digits-hard")
    for base, name, load in (
        ("google/vit-base-patch16-224", "vit-hard", transformers.AutoModelForImageClassification),
        ("Salesforce/blip-image-captioning-base", "blip-hard", transformers.BlipForConditionalGeneration),
    ):
        load.from_pretrained(folder / base, hard_attention={}).save_pretrained(folder / name)
        transformers.AutoProcessor.from_pretrained(folder / base).save_pretrained(folder / name)
    rows = [{"prompt": "the report says that all is well", "completion": "a dog"}] * 4
    for name in ("train.jsonl", "val.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_numbers_come_from_results() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "docs" / "render.py"), "--check"], check=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        if "assets/results/" in target:  # added to the site from results/
            target = os.path.relpath(ROOT / "results" / Path(target).name, page.parent)
        path = (page.parent / target).resolve()
        generated = ROOT / f"{path.stem.upper()}.md"  # changelog, contributing ...: added to the site by its hooks
        assert path.exists() or generated.exists(), f"{name(page)} links to {target}"
        if path.suffix == ".png":
            assert path.stat().st_size > 10_000


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "results").rglob("*.md"))], ids=name)
def test_names_of_sites_stay_whole(page: Path) -> None:
    """Markdown takes two asterisks outside of code for emphasis, and shows neither."""
    text = re.sub(r"^```.*?^```$|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert not [line for line in text.splitlines() if line.count(".*") > 1]


def test_results_name_no_path_of_a_machine() -> None:
    """What a stranger does not have: a command that made a figure must run in a clone."""
    for folder in ("results", "model_cards", "docs"):
        for path in (path for kind in ("*.json", "*.md") for path in (ROOT / folder).rglob(kind)):
            found = re.findall(r"(?<![\w.])/(?:tmp|home|root|work|Users)/\S*", path.read_text(encoding="utf-8"))
            assert not found, f"{name(path)} names {found[0]}"


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1300
    for section in re.findall(r"^## (.+)$", text, flags=re.M):
        assert len(section) < 60


# Words of earlier versions; the glossary gives the ones that replaced them.
REPLACED = re.compile(
    r"\b(OpenPass|ClosePass|trunk|trio|arms?|shoot-out|pupil|lesson|HardLayers|looks|looking everywhere|NOT HELD)\b"
)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_replaced_words_are_gone(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))
    assert not REPLACED.findall(text)


def test_replaced_words_are_gone_from_docstrings() -> None:
    """Also from ``--help``, which shows docstrings and the texts of options."""
    for path in sorted((ROOT / "hf_hardattn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                words = set(REPLACED.findall(re.sub(r"`[^`]*`", "", ast.get_docstring(node) or "")))
                assert not words - {"looks"}, f"{path}: {words}"


def test_what_a_prompt_shows_is_short() -> None:
    """Status, recordings and configurations at a prompt are a few lines, not tensors; completion offers the public names alone."""
    model = hf_hardattn.load("sample")
    with hf_hardattn.record(model) as recording, torch.no_grad():
        model(pixel_values=torch.zeros(1, 3, 64, 64))
    assert repr(hf_hardattn.status(model)).splitlines()[1].startswith("vision.inputs  9")
    assert repr(recording).splitlines()[1].split()[:3] == ["vision.inputs", "1", "14.1%"]
    shown = repr(hf_hardattn.HardAttentionConfig(sites=["vision.inputs"], budget=9))
    assert shown == "HardAttentionConfig(budget=9, sites={'vision.inputs': {}})"
    assert {"load", "save", "push", "HardAttentionCallback"} <= set(dir(hf_hardattn)) and "importlib" not in dir(
        hf_hardattn
    )
