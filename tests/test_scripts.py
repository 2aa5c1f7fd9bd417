"""The training scripts as a user runs them: tiny models from a config, tiny files, no network."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip.processing_blip import BlipProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import hf_hardattn
from hf_hardattn.training import checkpoints
from hf_hardattn.training.driver import Driver

SCRIPTS = Path(__file__).parents[1] / "scripts"
RESEARCH = SCRIPTS / "research"
WORDS = "red green blue big small square on grey".split()
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of ``main`` finds Accelerate as a new process would."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reset()


def reset() -> None:
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@functools.cache
def script(name: str) -> ModuleType:
    """A script, or one of those behind results/, under a name of its own: `evaluate` is a library too."""
    path = next(path for folder in (SCRIPTS, RESEARCH) if (path := folder / f"{name}.py").is_file())
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(name: str, *flags: Any) -> dict[str, Any]:
    """Call a script's ``main`` in this process; return what results.json says."""
    reset()
    words = [str(flag) for flag in flags]
    results = script(name).main(words)
    output = Path(words[words.index("--output_dir") + 1])
    assert json.loads((output / "results.json").read_text())["metrics"] == results["metrics"]
    return results


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def squares(folder: Path, count: int) -> list[tuple[Path, str]]:
    """Images of a coloured square on grey, named after the colour."""
    made = []
    for i in range(count):
        colour = list(COLOURS)[i % 3]
        image = Image.new("RGB", (12, 12), (90 + i, 90, 90))
        image.paste(COLOURS[colour], (4 * (i % 2), 4, 4 * (i % 2) + 8, 12))
        path = folder / colour / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        made.append((path, colour))
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a configuration and an image processor, and no weights."""
    path = tmp_path_factory.mktemp("vit")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, num_labels=3)
    ViTConfig(image_size=12, patch_size=4, hidden_dropout_prob=0.1, **sizes).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5")
    sizes = dict(vocab_size=13, d_model=26, d_kv=6, d_ff=39, num_layers=2, num_decoder_layers=1, num_heads=3)
    T5Config(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blip")
    sizes = dict(hidden_size=24, intermediate_size=37, num_attention_heads=3, num_hidden_layers=2)
    special = dict(bos_token_id=3, eos_token_id=1, sep_token_id=1, pad_token_id=0)
    text = dict(vocab_size=13, max_position_embeddings=31, **special, **sizes)
    BlipConfig(text_config=text, vision_config=dict(image_size=12, patch_size=4, **sizes)).save_pretrained(path)
    BlipProcessor(BlipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder, a class a folder."""
    path = tmp_path_factory.mktemp("photos")
    squares(path, 12)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "pairs.csv"
    rows = [
        f"{WORDS[i % 3]} {WORDS[3 + i % 2]} {' '.join(['grey'] * (i % 4))} square,{WORDS[i % 3]}" for i in range(12)
    ]
    path.write_text("\n".join(["source,target", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A json file of image paths, relative to it, and captions."""
    path = tmp_path_factory.mktemp("captions")
    rows = [{"image": str(image.relative_to(path)), "caption": f"{name} square"} for image, name in squares(path, 9)]
    (path / "pairs.json").write_text("\n".join(map(json.dumps, rows)))
    return path / "pairs.json"


@pytest.fixture(scope="module")
def vit_flags(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return [
        *("--model_name_or_path", vit, "--train_dir", photos, "--sites", "vision.inputs", "--budget", 0.5),
        *("--per_device_train_batch_size", 2, "--learning_rate", 1e-3, "--logging_steps", 1, "--cpu"),
        *("--cache_dir", tmp_path_factory.mktemp("cache")),
    ]


def test_vit_trains_saves_and_reloads_hard(vit_flags: list[Any], photos: Path, tmp_path: Path) -> None:
    flags = ["--validation_dir", photos, "--max_train_steps", 8, "--random_flip", "--selector_warmup_steps", 2]
    results = run("train_vit", *vit_flags, *flags, "--output_dir", tmp_path)
    assert set(results["metrics"]) == {"hard", "soft"} and results["metrics"]["hard"]["examples"] == 12
    assert results["metrics"]["hard"]["kept_ratio"] == {"vision.inputs": pytest.approx(5 / 9)}
    assert "kept_ratio" not in results["metrics"]["soft"]
    assert results["train"]["steps"] == 8 and results["arguments"]["budget"] == "0.5"
    assert {"torch", "transformers", "hf-hardattn"} <= set(results["versions"])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[0]["hardattn/vision.inputs/kept_ratio"] == 1  # the budget falls from everything
    assert logged[-2]["hardattn/vision.inputs/kept_ratio"] == pytest.approx(5 / 9)
    evaluated = [row for row in logged if "eval_accuracy" in row]
    assert evaluated and all(0 <= row["hardattn/changed_by_random"] <= 1 for row in evaluated)

    model = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert list(hf_hardattn.selectors(model)) == ["vision.inputs"]
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    again = run(
        "evaluate",
        "--model_name_or_path",
        tmp_path,
        "--validation_dir",
        photos,
        "--cpu",
        "--output_dir",
        tmp_path / "test",
    )
    for how in ("hard", "soft"):
        assert again["metrics"][how]["loss"] == pytest.approx(results["metrics"][how]["loss"], abs=1e-6)


def test_t5_trains_from_yaml_with_score_function_and_rouge(t5: Path, texts: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
        model_name_or_path: {t5}
        train_file: {texts}
        validation_file: {texts}
        hard_attention:
          sites: {{encoder.inputs: {{budget: 0.9}}}}
          estimator: reinforce
          temperature: {{start: 1.0, end: 0.5, steps: 4}}
        metrics: [rouge, bleu]
        learning_rate: 1e-3
        max_train_steps: 50
        logging_steps: 2
        num_beams: 2
        max_target_length: 4
        cpu: true
        evaluate_each_epoch: false
        cache_dir: {tmp_path}/cache
        """
    )
    results = run(
        "train_t5", "--config", config, "--max_train_steps", 4, "--budget", 0.6, "--output_dir", tmp_path / "out"
    )
    assert results["train"]["steps"] == 4 and results["arguments"]["evaluate_each_epoch"] is False
    assert results["hard_attention"]["budget"] == {"ratio": 0.6} and results["hard_attention"]["sites"] == {
        "encoder.inputs": {}
    }
    assert {"rougeL", "bleu", "chrf", "loss", "kept_ratio"} <= set(results["metrics"]["hard"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["hardattn/encoder.inputs/temperature"] for row in rows] == pytest.approx([0.875, 0.625])
    assert rows[0]["hardattn/reward"] < 0 and "hardattn/baseline" in rows[0]
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert hf_hardattn.selectors(model)["encoder.inputs"].config.estimator == "reinforce"


def test_blip_trains_with_lora_from_a_trained_base(blip: Path, captions: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shared = ["--train_file", captions, "--cpu", "--cache_dir", tmp_path / "cache", "--max_target_length", 5]
    run("train_blip", "--model_name_or_path", blip, *shared, "--max_train_steps", 1, "--output_dir", base)
    assert BlipForConditionalGeneration.from_pretrained(base).config.hard_attention is None  # no flag asked for it
    flags = [*shared, "--validation_file", captions, "--use_peft", "--lora_r", 2, "--sites", "vision.tokens.0"]
    tuned = run(
        "train_blip", "--model_name_or_path", base, *flags, "--processor_name", blip, "--max_train_steps", 2,
        *("--gradient_checkpointing", "--output_dir", tmp_path / "lora"),
        *("--use_rslora", "--use_dora", "--lora_modules_to_save", "post_layernorm"),
    )  # fmt: skip
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert adapter["use_rslora"] and adapter["use_dora"] and "post_layernorm" in adapter["modules_to_save"]
    assert tuned["metrics"]["hard"]["kept_ratio"]["vision.tokens.0"] == pytest.approx(5 / 9)
    again = run(
        "evaluate", "--model_name_or_path", tmp_path / "lora", "--validation_file", captions, *shared[2:],
        *("--output_dir", tmp_path / "test"),
    )  # fmt: skip
    assert again["metrics"]["hard"]["loss"] == pytest.approx(tuned["metrics"]["hard"]["loss"], abs=1e-6)
    assert again["metrics"]["hard"]["loss"] != again["metrics"]["soft"]["loss"]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the run die in the middle of optimizer step ``step``."""
    before = Driver.before_update

    def die(self: Driver) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        before(self)

    monkeypatch.setattr(Driver, "before_update", die)
    return lambda: monkeypatch.setattr(Driver, "before_update", before)


@pytest.mark.parametrize(("accumulation", "estimator"), [(1, "reinforce"), (2, "simple")])
def test_resume_equals_no_interruption(
    vit_flags: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, estimator: str
) -> None:
    """Noise, dropout, data order, schedules and baseline go on as if nothing had happened, mid-epoch and over its end."""
    schedule = json.dumps({"start": 2.0, "end": 0.5, "steps": 10})
    flags = [*vit_flags, "--gradient_accumulation_steps", accumulation, "--max_train_steps", 9, "--random_flip"]
    flags += ["--estimator", estimator, "--temperature", schedule, "--num_warmup_steps", 2]
    run("train_vit", *flags, "--output_dir", tmp_path / "whole")
    output = ["--output_dir", tmp_path / "parts", "--checkpointing_steps", 2, "--checkpoints_total_limit", 1]
    alive = stop_at(
        5, monkeypatch
    )  # accumulation 1: 6 steps an epoch, 2: 3 steps; the checkpoint of step 4 is mid-epoch
    with pytest.raises(KeyboardInterrupt):
        run("train_vit", *flags, *output)
    alive()
    assert [path.name for path in checkpoints.complete(str(tmp_path / "parts"))] == ["step_00000004"]
    seen = []
    begin = Driver.begin_step
    monkeypatch.setattr(
        Driver, "begin_step", lambda self, step, share=None: (seen.append(step), begin(self, step, share))
    )
    run("train_vit", *flags, *output, "--resume_from_checkpoint", "latest")
    assert seen == [step for step in range(4, 9) for _ in range(accumulation)]
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(whole) == list(range(1, 10)) and parts == pytest.approx(whole, abs=1e-5)
    first, second = (ViTForImageClassification.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_resume_refuses_another_batch_size(vit_flags: list[Any], tmp_path: Path) -> None:
    flags = [*vit_flags, "--output_dir", tmp_path, "--checkpointing_steps", "epoch", "--max_train_steps", 1]
    run("train_vit", *flags, "--resume_from_checkpoint", "latest")  # the first start of a job that may be preempted
    with pytest.raises(
        hf_hardattn.HardAttentionError, match="batch of all devices=3 but the checkpoint was made with 2"
    ):
        run(
            "train_vit",
            *flags,
            "--per_device_train_batch_size",
            3,
            "--resume_from_checkpoint",
            tmp_path / "checkpoints" / "step_00000001",
        )
    with pytest.raises(
        hf_hardattn.HardAttentionError, match="is not a checkpoint directory; available: .*step_00000001"
    ):
        run("train_vit", *flags, "--resume_from_checkpoint", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "{yaml}"], "unknown argument 'learning_rat'; .* Did you mean 'learning_rate'"),
        (["--learnig_rate", "1"], "Did you mean 'learning_rate'"),
        (["--hub_token", "hf_x"], "--hub_token is refused on the command line .*hf auth login"),
        (["--config", "nowhere.yaml"], "--config 'nowhere.yaml' is not a file"),
        (["--push_to_hub"], "--push_to_hub needs a repository"),
        (["--checkpointing_steps", "often"], "checkpointing_steps='often' is not a valid interval"),
        (["--logging_steps", "0"], "logging_steps=0 is out of range"),
        (["--adam_beta2", "1"], "adam_beta2=1.0 is out of range; it must be in"),
        (["--lr_scheduler_kwargs", "x"], "lr_scheduler_kwargs='x' is not valid JSON"),
        (["--lr_scheduler_kwargs", "[1]"], "is not a mapping; give the settings by name"),
        ([], "data sources given: none; use exactly one of"),
        (["--train_dir", "a", "--train_file", "b"], "given: --train_dir .* and --train_file"),
        (["--train_dir", "{tmp}/nowhere"], "nowhere is not a folder"),
        (["--train_file", "{yaml}"], "unknown data format '.yaml'"),
        (["--train_dir", "{photos}"], "no model is given"),
        (
            ["--train_dir", "{photos}", "--label_column", "kind"],
            "no column 'kind' in the data; it has: 'image', 'label'",
        ),
        (["--train_dir", "{photos}", "--model_name_or_path", "{t5}"], "is a 't5' model; this script trains 'vit'"),
        (["--train_dir", "{photos}", "--model_name_or_path", "{vit}", "--budget", "1.5"], "budget=1.5 is out of range"),
        (
            ["--train_dir", "{photos}", "--model_name_or_path", "{vit}", "--hard_attention", "none", "--budget", "8"],
            "--hard_attention none trains soft; --budget has no effect",
        ),
        (
            ["--train_dir", "{photos}", "--model_name_or_path", "{vit}", "--hard_attention", "x.json"],
            "'x.json' is not a file",
        ),
        (
            [
                "--train_dir",
                "{photos}",
                "--model_name_or_path",
                "{vit}",
                "--scorer",
                "random",
                "--selector_warmup_steps",
                "3",
            ],
            "selector_warmup_steps=3 leaves nothing to train",
        ),
    ],
)
def test_bad_input_is_refused(
    flags: list[str], message: str, vit: Path, t5: Path, photos: Path, tmp_path: Path
) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text("learning_rat: 1e-3\n")
    places = {"yaml": yaml, "tmp": tmp_path, "vit": vit, "t5": t5, "photos": photos}
    words = [flag.format(**places) for flag in flags]
    with pytest.raises(hf_hardattn.HardAttentionError, match=message):
        script("train_vit").main([*words, "--cpu", "--cache_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_booleans_are_real_and_yaml_values_are_checked(tmp_path: Path) -> None:
    from hf_hardattn.training.finetuning import load
    from hf_hardattn.training.parsing import parse

    arguments = load("image_classification").Arguments
    assert parse(arguments, ["--hub_private_repo", "False", "--use_peft"]).hub_private_repo is False
    assert parse(arguments, ["--no_evaluate_each_epoch"]).evaluate_each_epoch is False
    (tmp_path / "a.yaml").write_text(
        "use_peft: false\nsites: [a, b]\nlearning_rate: 1e-4\nbudget: 8\nhub_model_id: null\n"
    )
    args = parse(arguments, ["--seed", "3", "--config", str(tmp_path / "a.yaml"), "--learning-rate", "1e-5"])
    assert (args.use_peft, args.sites, args.learning_rate, args.seed) == (False, ["a", "b"], 1e-5, 3)
    assert (args.budget, args.hub_model_id) == ("8", None)
    (tmp_path / "b.yaml").write_text("seed: many\n")
    with pytest.raises(SystemExit):
        parse(arguments, ["--config", str(tmp_path / "b.yaml")])


def test_yaml_sets_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_hardattn.training.parsing import expand

    monkeypatch.setenv("HARDATTN_TEST", "old")
    (tmp_path / "a.yaml").write_text("env: {HARDATTN_TEST: 3}\nseed: 1\n")
    assert expand(["--config", str(tmp_path / "a.yaml")]) == ["--seed=1"] and os.environ["HARDATTN_TEST"] == "3"
    (tmp_path / "a.yaml").write_text("env: [HARDATTN_TEST]\n")
    with pytest.raises(hf_hardattn.HardAttentionError, match="env in .*a.yaml is not a mapping"):
        expand(["--config", str(tmp_path / "a.yaml")])


def test_settings_of_optimizer_schedule_and_order_arrive(
    vit_flags: list[Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's numbers, the schedule's own, the weights' type, an order of its own, an evaluation before the first step."""
    from hf_hardattn.training import loop, running

    seen: dict[str, Any] = {}

    class Watched(loop.Training):
        def run_steps(self, *args: Any) -> None:
            group = self.optimizer.param_groups[0]
            seen.update(betas=group["betas"], eps=group["eps"], places=list(self.order)[:4])
            seen["dtypes"] = {p.dtype for p in self.model.parameters()}
            super().run_steps(*args)

    monkeypatch.setattr(running, "Training", Watched)
    monkeypatch.setattr(running, "enable_full_determinism", lambda seed: seen.update(determined=seed))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda kind: seen.update(precision=kind))
    flags = [*vit_flags, "--validation_dir", photos, "--max_train_steps", 6, "--seed", 5, "--no_evaluate_each_epoch"]
    flags += ["--adam_beta1", 0.8, "--adam_beta2", 0.99, "--adam_epsilon", 1e-6, "--dtype", "bfloat16"]
    flags += ["--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", '{"num_cycles": 3}']
    flags += ["--full_determinism", "--allow_tf32", "--eval_on_start", "--data_seed", 1]
    run("train_vit", *flags, "--output_dir", tmp_path / "one")
    assert seen["betas"] == (0.8, 0.99) and seen["eps"] == 1e-6 and seen["dtypes"] == {torch.bfloat16}
    assert seen["determined"] == 5 and seen["precision"] == "high"
    rows = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0 and "eval_accuracy" in rows[0]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates[1] == pytest.approx(1e-3)  # the second of three cosines begins
    places = seen["places"]
    run("train_vit", *vit_flags, "--max_train_steps", 6, "--seed", 1, "--output_dir", tmp_path / "two")
    assert seen["places"] == places


@pytest.mark.parametrize("name", ["vit", "t5", "blip", "evaluate"])
def test_example_config_names_real_flags(name: str) -> None:
    from hf_hardattn.config import HardAttentionConfig
    from hf_hardattn.training.finetuning import choose
    from hf_hardattn.training.models import hard_attention
    from hf_hardattn.training.parsing import parse

    arguments = choose([], "vit" if name == "evaluate" else name).Arguments
    args = parse(arguments, ["--config", str(SCRIPTS / "configs" / f"{name}.yaml")])
    if name != "evaluate":
        assert isinstance(hard_attention(args, None), HardAttentionConfig)


@pytest.mark.parametrize("task", script("finetuning_runs").FAMILIES)
def test_real_runs_name_real_flags(task: str) -> None:
    """Every command of the runs behind results/finetuning parses; all branches take equally many steps, and differ as their variants do."""
    from hf_hardattn.training.finetuning import choose
    from hf_hardattn.training.models import hard_attention
    from hf_hardattn.training.parsing import expand, parse

    runs = script("finetuning_runs")
    found = {}
    for variant in runs.VARIANTS:
        program, *words = runs.flags(task, variant, 1)
        assert Path(program).is_file()
        args = parse(choose(expand(words), runs.FAMILIES[task]).Arguments, words)
        found[variant] = args, hard_attention(args, None)
    assert len({args.max_train_steps for variant, (args, _) in found.items() if variant != "base"}) == 1
    assert found["base"][1] is None and found["soft"][1] is None
    hard, random = found["hard"][1], found["random"][1]
    assert random.scorer == "random" != hard.scorer and random.sites.keys() == hard.sites.keys()
    assert hard.budget == random.budget <= 0.3 or all(site["budget"] <= 0.3 for site in hard.sites.values())
    assert found["hard"][0].model_name_or_path == found["base"][0].output_dir


def test_texts_by_language() -> None:
    from hf_hardattn.training.finetuning import load

    translation = load("translation")
    args = translation.Arguments(source_lang="en", target_lang="fr", source_prefix="big ", max_target_length=3)
    task = translation(args, Accelerator(cpu=True, mixed_precision="bf16"))
    task.columns(Dataset.from_dict({"translation": [{"en": "red", "fr": "blue"}]}))
    task.build(T5Config(vocab_size=13), tokenizer())
    batch = task.collate(
        [{"translation": {"en": "red", "fr": "blue"}}, {"translation": {"en": "red green", "fr": "blue grey"}}]
    )
    assert batch["input_ids"].shape == (2, 8) and batch["input_ids"][0, :3].tolist() == [7, 4, 1]
    assert batch["labels"][0].tolist() == [6, 1, *[-100] * 6]


@pytest.mark.multiprocess
def test_two_processes_agree_with_one(vit_flags: list[Any], photos: Path, tmp_path: Path) -> None:
    """As a user types it: two CPU processes with half the batch each take the same steps as one process."""
    flags = [*vit_flags, "--validation_dir", photos, "--max_train_steps", 3, "--estimator", "straight_through"]
    flags += ["--config_overrides", "hidden_dropout_prob=0.0"]
    # `accelerate launch --cpu` starts one process (or MPI); --multi_gpu is its name for torchrun, the script's --cpu does the rest
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    command += ["--num_machines", 1, "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [SCRIPTS / "train_vit.py"]
    command += [*flags, "--per_device_train_batch_size", 1, "--output_dir", tmp_path / "two"]
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    one = run("train_vit", *flags, "--output_dir", tmp_path / "one")
    assert two["processes"] == 2 and two["train"]["steps"] == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for how in ("hard", "soft"):
        assert two["metrics"][how]["loss"] == pytest.approx(one["metrics"][how]["loss"], abs=1e-5)
        assert two["metrics"][how]["examples"] == 12
    assert done.stdout.count("results.json") + done.stderr.count("-> ") <= 2  # one process speaks
