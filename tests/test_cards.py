"""Model cards: every number comes from results JSON, and the committed cards say what the results say."""

from __future__ import annotations

import hashlib
import html
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.cli import app
from hf_hardattn.hub.card import render, write_card
from hf_hardattn.hub.card_check import check_card
from hf_hardattn.hub.licences import conflict
from hf_hardattn.hub.markdown import bullets, plain
from hf_hardattn.hub.record import check_record, read_record
from hf_hardattn.hub.references import Resolver

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted((ROOT / "model_cards").glob("*/source.json"))
SOURCE = ROOT / "model_cards" / "vit-tiny-cluttered-digits-hard" / "source.json"


@pytest.fixture
def source(tmp_path):
    """A copy of a source with its results beside it, to be changed."""
    folder = tmp_path / "model_cards" / "one"
    folder.mkdir(parents=True)
    for file in [*(ROOT / "results").glob("*.*"), *(ROOT / "results" / "checkpoints").glob("*")]:
        copied = tmp_path / file.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(file.read_bytes())
    (folder / "source.json").write_text(SOURCE.read_text())
    return folder / "source.json"


def change(path, **fields):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | fields))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_card_says_what_the_results_say(path):
    """The committed README.md and card.json are what ``hf-hardattn card`` writes now; nothing was edited by hand."""
    assert check_card(path.parent) == []


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_what_a_card_imports_is_there(path):
    """A task without an auto class is loaded by the model's own class, and one whose class is ours by ``load`` alone."""
    code = (path.parent / "README.md").read_text().split("```python")[1].split("```")[0]
    exec("\n".join(line for line in code.splitlines() if "import" in line), {})


KEPT = [path.parent for path in CARDS if path.with_name("config.json").is_file()]


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_weights_beside_a_card_are_those_it_names(folder):
    """They are hard, and a push would send them with the card. An adapter's base is on the Hub, so that only its tensors are looked at."""
    adapter = (folder / "adapter_config.json").is_file()
    file = folder / ("adapter_model.safetensors" if adapter else "model.safetensors")
    if adapter:
        assert any(".selector." in name for name in load_file(file))
    else:
        model = hf_hardattn.load(folder)
        assert hf_hardattn.selectors(model)
        assert type(model).__name__ == json.loads((folder / "source.json").read_text())["model_class"]
    weights = file.read_bytes()
    assert hashlib.sha256(weights).hexdigest() in (folder / "README.md").read_text() and len(weights) < 25e6
    plan = hf_hardattn.push(folder, f"hf-hardattn/{folder.name}")
    assert {file.name, "README.md", "card.json"} <= set(plan.files) and not plan.card_problems


def test_writing_a_card_again_changes_nothing(source):
    card = write_card(source)
    first = card.read_bytes(), (source.parent / "card.json").read_bytes()
    result = CliRunner().invoke(app, ["card", str(source)])
    assert result.exit_code == 0, result.output
    assert (card.read_bytes(), (source.parent / "card.json").read_bytes()) == first
    assert (source.parent / "images" / "kept_patches.png").is_file()
    assert json.loads(source.read_text())["availability"] in card.read_text()
    assert CliRunner().invoke(app, ["card", "--check", str(source.parent)]).exit_code == 0


def test_the_metadata_is_what_the_hub_reads(source):
    change(
        source,
        base={
            "model": "google/vit-base-patch16-224",
            "revision": "main",
            "relation": "finetune",
            "license": "apache-2.0",
        },
    )
    record = read_record(source)
    record["energy"] = {
        "kwh": 0.5,
        "co2_grams": 41.2,
        "how": "measured",
        "scope": "whole machine",
        "software": "codecarbon",
        "hardware": "cpu",
        "region": "unknown",
    }
    record["runs"].append({"variant": "hard", "seed": 9, "status": "diverged", "value": {"not_measured": "NaN"}})
    data = ModelCard(str(render(record))).data.to_dict()
    assert data["library_name"] == "hf-hardattn" and data["tags"][:2] == ["hf-hardattn", "hard-attention"]
    assert data["base_model"] == "google/vit-base-patch16-224" and data["base_model_relation"] == "finetune"
    assert data["co2_eq_emissions"]["emissions"] == 41.2 and "whole machine" in data["co2_eq_emissions"]["source"]
    (entry,) = data["model-index"]
    value = json.loads((ROOT / "results/demo.json").read_text())["models"]["hard"]["accuracy"]
    assert entry["results"][0]["metrics"][0]["value"] == value
    text = str(render(record))
    assert "| hard | 9 | diverged | not measured (NaN) |" in text and "| hard | 89.5% | 1 of 2 |" in text
    assert "import hf_hardattn" in text.split("```python")[1]


def test_a_missing_number_is_no_card(source):
    results = source.parents[2] / "results" / "demo.json"
    data = json.loads(results.read_text())
    del data["models"]["random"]["accuracy"]
    results.write_text(json.dumps(data))
    with pytest.raises(
        HardAttentionError,
        match=r"accuracy' is missing\); no number of a card may be missing; at runs\[2\].value",
    ):
        write_card(source)
    assert not (source.parent / "README.md").exists() and not (source.parent / "card.json").exists()
    results.unlink()
    with pytest.raises(HardAttentionError, match="demo.json cannot be read .* the numbers of the card come from it"):
        write_card(source)


def test_a_missing_section_is_no_card(source):
    data = json.loads(source.read_text())
    del data["energy"], data["uses"]["limits"]
    data["runs"] = [run for run in data["runs"] if run["variant"] != "random"]
    source.write_text(json.dumps(data))
    with pytest.raises(HardAttentionError, match="is incomplete: uses.limits is missing; energy is missing"):
        write_card(source)
    change(
        source, energy={"not_measured": "no meter"}, uses={"intended": ["a"], "out_of_scope": ["b"], "limits": ["c"]}
    )
    with pytest.raises(HardAttentionError, match="runs of 'random' .failed runs count too"):
        write_card(source)
    change(source, energy={"not_measured": ""})
    with pytest.raises(HardAttentionError, match="energy: not_measured must give a reason and be the only key"):
        write_card(source)


def test_a_number_written_by_hand_is_refused(source):
    change(source, energy={"kwh": 0.1})
    with pytest.raises(
        HardAttentionError, match="energy.kwh=0.1 is written by hand; a card's numbers must come from results JSON"
    ):
        write_card(source)


def test_rows_of_a_list_and_failed_runs(tmp_path):
    runs = [
        {"variant": "simple", "seed": 0, "status": "finished", "metrics": {"accuracy": 0.5}},
        {"variant": "simple", "seed": 1, "status": "failed", "message": "NaN"},
        {"variant": "soft", "seed": 0, "status": "finished", "metrics": {"accuracy": 0.6}},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"runs": runs}))
    row = {
        "variant": "hard",
        "seed": {"$ref": "@/seed"},
        "value": {"$ref": "@/metrics/accuracy", "else": {"not_measured": {"$ref": "@/message"}}},
    }
    resolver = Resolver(tmp_path)
    found = resolver.resolve([{"$each": "x.json#/runs", "where": {"variant": "simple"}, "row": row}])
    assert found == [
        {"variant": "hard", "seed": 0, "value": 0.5},
        {"variant": "hard", "seed": 1, "value": {"not_measured": "NaN"}},
    ]
    assert list(resolver.sources) == ["x.json"]
    with pytest.raises(HardAttentionError, match="no row of x.json#/runs has"):
        resolver.resolve([{"$each": "x.json#/runs", "where": {"variant": "hard"}, "row": row}])


def controls(path):
    """The random choices of a comparison; a card needs one."""
    return [name for name in json.loads(path.read_text())["variants"] if name.endswith("random")]


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "results" / "compare").glob("*.json")) if controls(path)],
    ids=lambda path: path.stem,
)
def test_a_comparison_makes_the_rows_of_a_card(source, path):
    """What ``hf-hardattn compare`` writes needs no code of its own: references name its rows."""
    results = json.loads(path.read_text())
    chosen, metric = (
        next(name for name in results["variants"] if name != "soft" and not name.endswith("random")),
        results["metric"],
    )
    rows = [
        {
            "$each": "results.json#/runs",
            "where": {"variant": name},
            "row": {
                "variant": shown,
                "seed": {"$ref": "@/seed"},
                "status": {"$ref": "@/status"},
                "value": {"$ref": f"@/metrics/{metric}", "else": {"not_measured": {"$ref": "@/message"}}},
            },
        }
        for shown, name in (("hard", chosen), ("soft", "soft"), ("random", controls(path)[0]))
    ]
    (source.parent / "results.json").write_bytes(path.read_bytes())
    change(source, runs=rows)
    text, count = write_card(source).read_text(), len(results["seeds"])
    ended = [run for run in results["runs"] if run["variant"] == chosen and metric in run.get("metrics", {})]
    assert f"{len(ended)} of {count} |" in text
    assert count == 1 or f"mean ± sd, {len(ended)} seed" in text
    assert check_card(source.parent) == []


@pytest.mark.parametrize("field", ["summary", "name"])
def test_markup_in_a_field_is_shown_and_not_obeyed(source, field):
    record = read_record(source)
    record[field] = "<script>alert(1)</script> [x](javascript:1) | a `b`\n# heading\n---"
    record["runs"][0]["status"] = "</td><img src=x onerror=y>"
    record["reproduce"]["commands"] = ["run\n```\n<script>"]
    record["pictures"][0]["alt"] = "](x) <b>"
    text = str(render(record))
    body = text.split("---\n", 2)[2].replace("<!--", "").replace("run\n` ` `\n<script>", "")
    assert "<script" not in body and "<img" not in body and "<b>" not in body and "](javascript" not in body
    assert "\n# heading" not in text
    assert ModelCard(text).data.library_name == "hf-hardattn"


@pytest.mark.parametrize(
    ("field", "value"), [("repo_id", "a/b/../c"), ("repo_id", 'x"); import os  # '), ("file", "../x.html")]
)
def test_names_are_names(source, field, value):
    record = read_record(source)
    if field == "file":
        record["pictures"][0]["file"] = value
    else:
        record[field] = value
    with pytest.raises(HardAttentionError, match="is not (the name of a repository|a picture file)"):
        render(record)


def test_the_check_bites(source):
    card = write_card(source)
    folder, text = source.parent, card.read_text()
    assert check_card(folder) == []
    card.write_text(text.replace("89.5%", "98.5%"))
    assert "README.md does not match card.json" in check_card(folder)[0]
    card.write_text(text)
    results = source.parents[2] / "results" / "demo.json"
    results.write_text(results.read_text().replace("0.8945", "0.9945"))
    problems = check_card(folder)
    assert any("card.json does not match source.json and the current results" in problem for problem in problems)
    assert any("demo.json changed since the card was written" in problem for problem in problems)
    assert CliRunner().invoke(app, ["card", "--check", str(folder)]).exit_code == 1
    write_card(source)
    assert check_card(folder) == []
    change(source, base={"model": "a/b", "revision": "main", "relation": "finetune", "license": "cc-by-nc-4.0"})
    write_card(source)
    assert "differs from the base model's cc-by-nc-4.0" in check_card(folder)[0]
    change(source, summary="token hf_" + "a" * 34)
    write_card(source)
    assert any("holds an access token" in problem for problem in check_card(folder))
    (folder / "card.json").unlink()
    assert check_card(folder) == ["card.json is missing; write both with: hf-hardattn card source.json"]


def test_a_record_without_validation_is_incomplete(source):
    record = read_record(source)
    record["external_validation"] = " "
    with pytest.raises(HardAttentionError, match="external_validation=.* is not words"):
        check_record(record, "x")


@pytest.mark.parametrize(
    ("licence", "base", "fine"),
    [
        ("apache-2.0", "none", True),
        ("apache-2.0", "mit", True),
        ("mit", "apache-2.0", True),
        ("gpl-3.0", "apache-2.0", True),
        ("apache-2.0", "gpl-3.0", False),
        ("gpl-3.0", "gpl-3.0", True),
        ("mit", "cc-by-nc-4.0", False),
        ("cc-by-nd-4.0", "cc-by-nd-4.0", True),
        ("mit", "cc-by-nd-4.0", False),
        ("cc0-1.0", "mit", False),
        ("mit", "cc0-1.0", True),
        ("apache-2.0", "unknown", False),
        ("unknown", "mit", False),
    ],
)
def test_licences(licence, base, fine):
    assert (conflict(licence, base) is None) == fine


@pytest.mark.parametrize(
    "word",
    [
        "~~~",
        "```",
        "# big",
        "###### small",
        "- item",
        "+ item",
        "* item",
        "1. one",
        "2) two",
        "---",
        "===",
        "***",
        "___",
    ],
)
def test_no_word_of_a_record_is_markup(word):
    """As a line of its own, in a paragraph and in a list: it stays words, and what follows stays what it is."""
    from markdown_it import MarkdownIt

    for text in (f"{plain(word)}\n\nafter", bullets([word, "after"]), f"before\n{plain(word)}\n\nafter"):
        kinds = {token.type for token in MarkdownIt().parse(text)} - {"inline"}
        allowed = (
            {"paragraph", "bullet_list", "list_item"}
            if text.startswith("- &") or text.startswith("- ")
            else {"paragraph"}
        )
        assert kinds == {f"{kind}_{end}" for kind in allowed for end in ("open", "close")}, text
        assert word.split()[-1] in html.unescape(text)


def test_emphasis_and_strikethrough_are_words():
    from markdown_it import MarkdownIt

    for word in ("*a*", "**a**", "_a_", "__a__", "~~a~~", "\\*", "`a`", "[a](b)", "<b>"):
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parseInline(plain(word))[0].children
        assert "".join(token.content for token in tokens) == word and {token.type for token in tokens} <= {
            "text",
            "text_special",
        }
    assert plain("snake_case_name 0.5 -1.25 v1.0") == "snake_case_name 0.5 -1.25 v1.0"
