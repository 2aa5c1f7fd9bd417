"""Commands on what one's own training left: a card, a benchmark, a page, a push."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples import build
from hub_server.models import harden, stock
from test_checkpoints import flags, fresh_process, run  # noqa: F401
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn.cli import app, bench
from hf_hardattn.efficiency import suites
from hf_hardattn.efficiency.bench import flops, models_of, work_of
from hf_hardattn.efficiency.workloads import Workload
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.hub import pushing
from hf_hardattn.hub.card_check import check_card
from hf_hardattn.hub.contents import list_files
from hf_hardattn.training.compare_report import is_part_of
from hf_hardattn.training.comparison import Comparison
from hf_hardattn.training.parsing import shipped


def command(*words: object) -> str:
    """What a command says; its error is raised."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("own") / "vit run"
    data = flags[flags.index("--train_dir") + 1]
    run(flags, folder, "--max_train_steps", 1, "--validation_dir", data)
    return folder


def test_a_card_of_ones_own_run(trained: Path, tmp_path: Path) -> None:
    said = command("card", trained)
    assert said.startswith("wrote") and not any("not what card.json says" in problem for problem in check_card(trained))
    text = (trained / "README.md").read_text()
    results = json.loads((trained / "results.json").read_text())
    assert "your-name/vit-run" in text and f"{results['metrics']['hard']['examples']}" in text
    parameters, weights = results["parameters"], trained / "model.safetensors"
    assert (
        parameters["all"]
        == sum(p.numel() for p in hf_hardattn.load(trained).parameters())
        > parameters["selectors"]
        > 0
    )
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == results["hashes"][weights.name] in text
    assert command("card", trained / "results.json").startswith("wrote")  # either way
    assert command("card", trained / "source.json").startswith("wrote")
    with pytest.raises(HardAttentionError, match="--repo-id has no effect"):
        command("card", trained, "--repo-id", "me/vit")
    (trained / "README.md").write_text("# Mine")
    with pytest.raises(HardAttentionError, match="README.md was not written by this command"):
        command("card", trained)
    assert command("card", trained, "--overwrite").startswith("wrote")


def test_a_folder_without_a_run_has_no_card(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(HardAttentionError, match="holds neither source.json nor results.json"):
            command("card", path)


def test_the_suite_of_gpus_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardAttentionError, match="suite 'gpu' measures a GPU, and PyTorch sees none"):
        command("bench", "--suite", "gpu", "--no-fixed-allocator")
    with pytest.raises(
        HardAttentionError,
        match="unknown suite 'competng'; .*'competing', .*'gpu', .*'host'.* Did you mean 'competing'",
    ):
        command("bench", "--suite", "competng", "--no-fixed-allocator")


def test_a_benchmark_measures_a_model_at_its_own_sites(tmp_path: Path) -> None:
    config = {"sites": {"vision.tokens.1": {"scorer": "mlp"}}, "budget": {"start": 1.0, "end": 0.25, "steps": 0.4}}
    hf_hardattn.save(harden(stock(), config), tmp_path)
    suite = bench._own(str(tmp_path), [], [], [], None, 2, "float32", 4)
    (group,) = suite["groups"]
    assert group["sizes"] == [12] and group["batch"] == 2
    (row,) = group["rows"]
    assert row["hard"]["budget"] == 0.25 and row["hard"]["sites"]["vision.tokens.1"]["scorer"] == "mlp"
    hf_hardattn.apply(stock(), row["hard"])
    with pytest.raises(HardAttentionError, match="does not say what to measure"):
        bench._own("vit", [], [], [], None, 1, "float32", 4)


@pytest.mark.parametrize(
    "family, head, size",
    [
        ("bert", "BertForSequenceClassification", 40),
        ("roberta", "RobertaModel", 39),  # its positions start behind that of padding
        ("dinov2", "Dinov2Model", 12),
        ("siglip2", "Siglip2VisionModel", 12),
        ("whisper", "WhisperForConditionalGeneration", 11),
        ("t5", "T5Model", 512),
        ("gru", "GruForConditionalGeneration", 512),
    ],
)
def test_a_benchmark_measures_a_model_of_any_family(tmp_path: Path, family: str, head: str, size: int) -> None:
    """At its own sites, on inputs that fit it, through generate() where it writes."""
    model = hf_hardattn.apply(build(family, head).model)
    hf_hardattn.save(model, tmp_path)
    (group,) = suites.parse(bench._own(str(tmp_path), [], [], [], None, 1, "float32", 2), "own").groups
    assert (group.workload.size, group.workload.generates) == (size, model.can_generate())
    group = replace(group, workload=replace(group.workload, size=min(size, 40)))
    models = models_of(group)
    inputs = group.workload.inputs(models["stock"])
    counted = {name: flops(work_of(group.workload, each, inputs)) for name, each in models.items()}
    assert 0 < counted["as saved"] < counted["stock"] == counted["exact"]


def test_a_benchmark_takes_other_budgets_at_a_models_own_sites(tmp_path: Path) -> None:
    hf_hardattn.save(harden(stock(), {"sites": {"vision.tokens.1": {"scorer": "mlp", "budget": 0.5}}}), tmp_path)
    suite = bench._own(str(tmp_path), [], [], [0.25, 3.0], None, 1, "float32", 4)
    rows = suites.parse(suite, "own").groups[0].rows
    assert [row.hard["budget"] for row in rows] == [0.25, 3] and all(row.trained for row in rows)
    kept = [hf_hardattn.selectors(hf_hardattn.apply(stock(), row.hard))["vision.tokens.1"].config for row in rows]
    assert [(config.budget, config.scorer) for config in kept] == [(0.25, "mlp"), (3, "mlp")]


@pytest.mark.parametrize(
    "words, message",
    [
        ("bench --site vision.inputs", "--site has no effect without --model"),
        ("bench --model vit --size 32 --site vision.inputs --suite gpu", "--suite has no effect with --model"),
        ("bench --models outputs/x", "--models has no effect for any suite except 'competing'"),
        ("bench --model vit --config x.json --budget 0.5", "--budget has no effect with --config"),
        ("demo --port 80", "--port has no effect without --ui"),
        ("demo --ui --seed 1", "--seed has no effect with --ui"),
        ("card --check . --repo-id me/x", "--repo-id has no effect with --check"),
    ],
)
def test_an_option_without_effect_is_refused(words: str, message: str) -> None:
    with pytest.raises(HardAttentionError, match=message):
        command(*words.split())


def test_a_benchmark_overwrites_nothing_unasked(tmp_path: Path) -> None:
    (tmp_path / "host.json").write_text("{}")
    with pytest.raises(HardAttentionError, match="host.json' already exists"):
        command("bench", "--suite", "host", "--no-fixed-allocator", "--output", tmp_path)


def test_a_benchmark_of_images_and_texts_needs_their_processor(tmp_path: Path) -> None:
    hf_hardattn.save(hf_hardattn.apply(build("clip", "CLIPModel").model), tmp_path)
    workload = Workload(str(tmp_path), 12)
    with pytest.raises(HardAttentionError, match="holds no processor, but CLIPModel reads images and texts"):
        workload.inputs(workload.build())


@pytest.mark.parametrize("words", [["--ui"], ["--space", "sp"]])
def test_a_page_needs_the_model_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HardAttentionError, match="outputs/demo/hard holds no model.* Run 'hf-hardattn demo' first"):
        command("demo", *words, "--output", "outputs/demo")
    assert not (tmp_path / "sp").exists()


def test_a_space_without_a_trained_model_shows_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command("demo", "--space", "sp")
    assert "launch(['sample']" in (tmp_path / "sp" / "app.py").read_text()
    assert (tmp_path / "sp" / "hf_hardattn" / "sample" / "model" / "model.safetensors").is_file()


def test_a_demo_does_not_replace_what_a_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HardAttentionError, match="is not empty; existing files are not overwritten by default"):
        command("demo", "--quick", "--output", tmp_path)


def test_a_push_names_every_file_that_is_wrong_at_once(tmp_path: Path) -> None:
    hf_hardattn.save(harden(stock()), tmp_path)
    for name in ("a.exe", "b.py", "c.pkl"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        HardAttentionError, match="3 files of .* a.exe is not a file of a model.* b.py is unsafe.* c.pkl is unsafe"
    ):
        list_files(tmp_path)


def test_what_a_trainer_leaves_beside_a_model_is_left_out(tmp_path: Path) -> None:
    hf_hardattn.save(harden(stock()), tmp_path)
    left = [
        "optimizer.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
    ]
    for name in left:
        (tmp_path / name).write_text("x")
    assert list_files(tmp_path) == (["config.json", "model.safetensors"], sorted(left))


@pytest.mark.parametrize(
    ("form", "pattern", "part"),
    [
        ("full", "*.safetensors", "model.safetensors"),
        ("full", "model*", "model.safetensors"),
        ("full", "config.json", "config.json"),
        ("sharded", "model-00002*", "model-00002-of-"),
        ("sharded", "*.index.json", "model.safetensors.index.json"),
        ("selectors", "selectors.*", "selectors.safetensors"),
        ("selectors", "hard_attention.json", "hard_attention.json"),
    ],
)
def test_no_part_of_a_model_is_left_out_of_a_push(tmp_path: Path, form: str, pattern: str, part: str) -> None:
    """Others could not load the rest, and the weights already on the Hub would be taken for stale ones."""
    options: dict[str, Any] = {"sharded": {"max_shard_size": "20KB"}}.get(form, {})
    if form == "selectors":
        options = {"selectors_only": True, "base_model": "ann/base"}
    hf_hardattn.save(harden(stock()), tmp_path, **options)
    with pytest.raises(
        HardAttentionError, match=f"{part}.* of .* is left out, and the repository would hold no whole model"
    ):
        hf_hardattn.push(tmp_path, "me/vit", exclude=(pattern,))


def test_what_is_left_out_is_named_and_not_removed_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_hardattn.save(harden(stock()), tmp_path)
    for name in ("notes.txt", "pytorch_model.bin"):
        (tmp_path / name).write_text("x")
    there = [SimpleNamespace(rfilename=name) for name in ("pytorch_model.bin", "adapter_model.safetensors")]
    monkeypatch.setattr(
        pushing.HfApi, "model_info", lambda *a, **k: SimpleNamespace(private=True, sha="0" * 40, siblings=there)
    )
    plan = hf_hardattn.push(tmp_path, "me/vit", exclude=("notes*", "*.bin"))
    assert plan.files.keys() == {"config.json", "model.safetensors"}
    assert plan.left_out == ("notes.txt", "pytorch_model.bin") and plan.removed == ("adapter_model.safetensors",)
    with pytest.raises(HardAttentionError, match=r"--exclude 'tokeniser\*' matches no file of"):
        hf_hardattn.push(tmp_path, "me/vit", exclude=("notes*", "*.bin", "tokeniser*"))
    with pytest.raises(HardAttentionError, match=r"is a string; it is a tuple of globs. Use exclude=\('\*.bin',\)"):
        hf_hardattn.push(tmp_path, "me/vit", exclude="*.bin")  # type: ignore[arg-type]


def test_a_dry_run_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_hardattn.save(harden(stock()), tmp_path)

    def unreachable(self: object, *args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(pushing.HfApi, "model_info", unreachable)
    plan = hf_hardattn.push(tmp_path, "me/vit")
    assert plan.files.keys() == {"config.json", "model.safetensors"} and not plan.asked
    assert "me/vit: unknown, because the Hub did not answer, private" in str(plan)
    with pytest.raises(HardAttentionError, match="could not be queried about me/vit"):
        hf_hardattn.push(tmp_path, "me/vit", dry_run=False)


@pytest.mark.parametrize(
    "content", ["variants: [a]\ntask: x", "- a", "task: x\nvariants: 3", "task: x\nvariants: {a: }\nrecipe: [1]"]
)
def test_a_comparison_of_the_wrong_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(HardAttentionError, match="must be a mapping"):
        Comparison.read(tmp_path / "c.yaml")


def test_configurations_under_scripts_come_with_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an installed library, whose user has no scripts/."""
    package = Path(hf_hardattn.__file__).parent
    monkeypatch.chdir(tmp_path)
    assert shipped(Path("scripts/configs/none.yaml")) == Path("scripts/configs/none.yaml")
    monkeypatch.setattr("hf_hardattn.training.parsing.__file__", str(tmp_path / "p" / "training" / "parsing.py"))
    (tmp_path / "p" / "_scripts" / "configs").mkdir(parents=True)
    (tmp_path / "p" / "_scripts" / "configs" / "vit.yaml").write_text("seed: 1")
    assert shipped(Path("scripts/configs/vit.yaml")) == tmp_path / "p" / "_scripts" / "configs" / "vit.yaml"
    assert package.is_dir()


def test_list_says_whole_sentences() -> None:
    text = command("list")
    assert "norm(x_n) + b_h." in text and "vision (inputs, " in text and "`" not in text
    assert "visual_question_answering" in text and "teacher - the same model" in text


def test_env_names_processor_devices_and_extras() -> None:
    facts = json.loads(command("env"))
    assert facts["processors"] >= 1 and facts["processor"] and facts["devices"]
    assert {"demo", "metrics", "vision"} <= facts["extras"].keys()


def test_a_quick_comparison_never_replaces_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one with other variants or fewer seeds; the same again does."""
    comparison = Comparison("needle", {"soft": None, "simple": None})
    _, recipe, variants = comparison.settle()
    report = {"task": "needle", "recipe": vars(recipe), "variants": variants, "seeds": [0, 1]}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert is_part_of(path, comparison, False, [0, 1]) and is_part_of(path, comparison, False, [0, 1, 2])
    assert not is_part_of(path, comparison, True, [0, 1])
    assert not is_part_of(path, comparison, False, [0])
    assert not is_part_of(path, comparison.only(["soft"]), False, [0, 1])
    for other in ("{}", "[]", "x", ""):
        path.write_text(other)
        assert not is_part_of(path, comparison, False, [0, 1])


def test_compare_writes_under_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("needle.yaml").write_text("task: needle\nvariants: {soft: , simple: }\n")
    said = command("compare", "--config", "needle.yaml", "--quick", "--seeds", 1)
    assert "outputs/compare/needle-quick.json" in said.replace("\n", "") and not Path("results").exists()
    Path("mine.json").write_text("{}")
    with pytest.raises(HardAttentionError, match="mine.json' already exists"):
        command("compare", "--config", "needle.yaml", "--quick", "--seeds", 1, "--output", "mine.json")
    assert Path("mine.json").read_text() == "{}"
