"""The configurations under ``scripts/accelerate``, read by the tools they are for; and ``hf-hardattn train``."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from hf_hardattn.errors import HardAttentionError
from hf_hardattn.training.sharding import check_warmup

FOLDER = Path(__file__).parents[1] / "scripts" / "accelerate"
NAMES = ("ddp", "fsdp2", "multi_node", "zero2", "zero3")


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*NAMES, "train.sky"}


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_configuration(name: str) -> None:
    """Its own class refuses unknown keys at the top; those of a section are flags of its launcher, which it does not check."""
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.num_processes % (8 * config.num_machines) == 0
    flags = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(config, section)) <= flags
    assert not path.read_text().startswith("compute_environment")  # a comment says how to use it


def test_fsdp2_configuration_builds_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config.items():
        monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.transformer_cls_names_to_wrap is None
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and plugin.reshard_after_forward is True


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configuration_builds_a_plugin(stage: int) -> None:
    """Accelerate's plugin takes every setting of the section, and DeepSpeed's own configuration says the same."""
    section = load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config
    plugin = DeepSpeedPlugin(**section)
    made = plugin.deepspeed_config
    assert made["zero_optimization"]["stage"] == stage == plugin.zero_stage
    assert made["gradient_accumulation_steps"] == 1 and made["gradient_clipping"] == 1.0
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "none" and plugin.zero3_init_flag is False
    assert made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)


def test_deepspeed_refuses_a_warm_up_of_selectors() -> None:
    check_warmup(DistributedType.DEEPSPEED, 0)
    check_warmup(DistributedType.FSDP, 5)
    with pytest.raises(
        HardAttentionError, match="selector_warmup_steps=5 has no effect under DeepSpeed; .*--train_selectors_only"
    ):
        check_warmup(DistributedType.DEEPSPEED, 5)


def test_job_files_parse_and_name_real_flags() -> None:
    subprocess.run(["bash", "-n", FOLDER / "train.slurm"], check=True)
    task: dict[str, Any] = yaml.safe_load((FOLDER / "train.sky.yaml").read_text())
    assert set(task) <= {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run", "envs"}
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    from hf_hardattn.training.arguments import ScriptArguments

    for text in (task["run"], (FOLDER / "train.slurm").read_text()):
        assert "--resume_from_checkpoint latest" in text
        for word in text.split():
            if (
                word.startswith("--")
                and "_" in word
                and not word.startswith(("--nproc", "--node", "--master", "--rdzv"))
            ):
                assert word.removeprefix("--").partition("=")[0] in ScriptArguments.__dataclass_fields__


def test_train_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Its help is its own; a family's help and flags are those of the training."""
    from typer.testing import CliRunner

    from hf_hardattn.cli import app

    runner = CliRunner()
    assert "Exit code 143" in runner.invoke(app, ["train", "--help"]).output.replace("\n", " ")
    assert "--selector_warmup_steps" in runner.invoke(app, ["train", "vit", "--help"]).output
    for words, message in (
        (["bert"], "unknown model family 'bert' .*vit"),
        (["vit", "--learnig_rate", "1"], "Did you mean 'learning_rate'"),
        (["t5", "--task", "captioning"], "unknown task of t5 'captioning'"),
    ):
        found = runner.invoke(app, ["train", *words]).exception
        assert isinstance(found, HardAttentionError)
        with pytest.raises(HardAttentionError, match=message):
            raise found
