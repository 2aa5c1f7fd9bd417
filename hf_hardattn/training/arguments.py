"""Flags that the training scripts share. The dataclass of a task inherits from these and adds its own flags."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..errors import HardAttentionError


def flag(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and a help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class ModelArguments:
    """Which model, and which of its weights are trained."""

    model_name_or_path: str | None = flag(
        None, "Hub name or directory; a directory with a config.json and no weights is trained from scratch."
    )
    config_name: str | None = flag(None, "Configuration to use instead of the model's.")
    config_overrides: str | None = flag(None, "Changes to the configuration, e.g. num_layers=2,d_model=64.")
    processor_name: str | None = flag(None, "Tokenizer or image processor to use instead of the model's.")
    model_revision: str = flag("main", "Branch, tag or commit on the Hub.")
    cache_dir: str | None = flag(None, "Directory for downloads and prepared data.")
    attn_implementation: str | None = flag(None, "eager | sdpa | ...; Transformers' choice by default.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = flag(
        None, "Dtype of the weights; the checkpoint's by default."
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass: less memory, more time.")
    use_peft: bool = flag(False, "Train LoRA adapters and the selectors; the backbone is frozen.")
    lora_r: int = flag(16, "Rank of the adapters.")
    lora_alpha: int = flag(32, "Scale of the adapters.")
    lora_dropout: float = flag(0.05, "Dropout in the adapters.")
    lora_target_modules: list[str] | None = flag(None, "Modules that get an adapter; queries and values by default.")
    lora_modules_to_save: list[str] | None = flag(
        None, "Modules to train in full, in addition to the selectors and the task's head."
    )
    use_rslora: bool = flag(False, "Scale adapters by lora_alpha / sqrt(lora_r) instead of lora_alpha / lora_r.")
    use_dora: bool = flag(False, "Train the magnitude of each weight separately from its direction.")
    train_selectors_only: bool = flag(
        False, "Train only the selectors; the rest of the model is frozen, and saved with them."
    )


@dataclass(kw_only=True)
class HardAttentionArguments:
    """Where the model selects; the short flags override every site of --hard_attention."""

    hard_attention: str | None = flag(
        None, "HardAttentionConfig: inline JSON, or a .json or .yaml file; 'none' trains a hard checkpoint soft."
    )
    sites: list[str] | None = flag(None, "Site globs, e.g. vision.tokens.3 'vision.tokens.*'.")
    recipe: str | None = flag(None, "Named settings that trained well in our measurements: robust.")
    budget: str | None = flag(
        None, "How many positions to keep: 8, 0.25, threshold:0.5, top_p:0.9, or a schedule as JSON."
    )
    scorer: str | None = flag(None, "How the positions are scored.")
    estimator: str | None = flag(None, "How the gradient passes through the selection.")
    baseline: str | None = flag(None, "What a score-function estimator subtracts from the reward.")
    temperature: str | None = flag(None, "Temperature of the sampling distribution: a number, or a schedule as JSON.")
    selector_warmup_steps: int = flag(0, "First optimizer steps, in which only the selectors are trained.")
    selector_learning_rate: float | None = flag(
        None, "Learning rate of the selectors; by default --learning_rate, but at least 1e-3."
    )


@dataclass(kw_only=True)
class DataArguments:
    """Which data: the Hub's, a folder of images, or csv and json files."""

    folder_format: ClassVar[str] = "imagefolder"  # builder of `datasets` that reads --train_dir
    dataset_name: str | None = flag(None, "Data set on the Hub, or its local directory.")
    dataset_config_name: str | None = flag(None, "Configuration of dataset_name.")
    train_split: str = flag("train", "Split of dataset_name to train on.")
    validation_split: str = flag("validation", "Split of dataset_name to evaluate on.")
    train_dir: str | None = flag(
        None,
        "Folder of images (for a video task: of videos) with one folder per class, or with a metadata.jsonl or .csv; or a folder with "
        "one such folder per split: train/ and validation/ or test/.",
    )
    validation_dir: str | None = flag(None, "The same, for evaluation.")
    train_file: str | None = flag(None, "csv, tsv, json or jsonl file to train on.")
    validation_file: str | None = flag(None, "The same, for evaluation.")
    validation_fraction: float = flag(
        0.0, "Share of the training data to hold out for evaluation if no other data is given."
    )
    streaming: bool = flag(False, "Stream the training data instead of loading all of it; needs --max_train_steps.")
    shuffle_buffer: int = flag(1000, "Rows of a stream from which the next one is drawn at random.")
    max_train_samples: int | None = flag(None, "Maximum number of training examples.")
    max_eval_samples: int | None = flag(None, "Maximum number of evaluation examples.")
    dataloader_num_workers: int = flag(0, "Number of processes that prepare batches.")


@dataclass(kw_only=True)
class OptimizationArguments:
    """How to train."""

    per_device_train_batch_size: int = flag(8, "Examples per device and micro-batch.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches per optimizer step.")
    num_train_epochs: float = flag(3.0, "Passes over the training data.")
    max_train_steps: int | None = flag(None, "Number of optimizer steps; overrides num_train_epochs.")
    learning_rate: float = flag(5e-5, "Peak learning rate of everything but the selectors.")
    lr_scheduler_type: str = flag("linear", "linear | cosine | constant | constant_with_warmup | ...")
    lr_scheduler_kwargs: str | None = flag(None, 'Other settings of the schedule as JSON, e.g. {"num_cycles": 2}.')
    num_warmup_steps: int = flag(0, "Optimizer steps over which the learning rate rises.")
    weight_decay: float = flag(0.0, "Weight decay of AdamW; not applied to biases and norms.")
    adam_beta1: float = flag(0.9, "Decay of the running mean of gradients, in [0, 1).")
    adam_beta2: float = flag(0.999, "Decay of the running mean of squared gradients, in [0, 1).")
    adam_epsilon: float = flag(1e-8, "Added to the square root of the running mean of squared gradients.")
    max_grad_norm: float = flag(1.0, "Clip gradients to this norm; 0 disables clipping.")
    seed: int = flag(42, "Seed of the new weights, the data order and the sampling noise.")
    data_seed: int | None = flag(None, "Seed of the data order only; --seed by default.")
    full_determinism: bool = flag(False, "Use only deterministic kernels: slower, and an error where none exists.")
    allow_tf32: bool = flag(False, "Compute float32 matrix products in TF32 on GPUs that support it: faster.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Mixed precision; by default that of accelerate launch."
    )
    cpu: bool = flag(False, "Train on the CPU even if there is a GPU.")


@dataclass(kw_only=True)
class EvaluationArguments:
    """When to evaluate, and which model to keep."""

    per_device_eval_batch_size: int = flag(8, "Examples per device in evaluation.")
    evaluate_each_epoch: bool = flag(True, "Evaluate after each epoch, in addition to the end.")
    eval_on_start: bool = flag(False, "Also evaluate before the first step.")
    eval_steps: int | None = flag(None, "Evaluate every N optimizer steps instead of after each epoch.")
    load_best_model_at_end: bool = flag(False, "Keep the model of the best evaluation instead of the last step.")
    metric_for_best_model: str | None = flag(
        None, "Metric that decides which model is best, or loss; the task's first metric by default."
    )
    lower_is_better: bool = flag(False, "A lower metric_for_best_model is better; always so for loss.")
    early_stopping_patience: int = flag(
        0, "Stop after N evaluations without improvement, and keep the best model; 0 disables this."
    )
    validation_steps: int = flag(
        0, "Draw the kept positions of validation examples every N optimizer steps; 0 disables this."
    )
    num_validation_examples: int = flag(6, "Number of validation examples to draw.")


@dataclass(kw_only=True)
class OutputArguments:
    """What a run writes, and how it continues after an interruption."""

    output_dir: str = flag("outputs/run", "Directory for the model, results.json, log.jsonl and checkpoints.")
    overwrite: bool = flag(False, "Replace the files of an earlier run in output_dir.")
    checkpointing_steps: str | None = flag(None, "Save a checkpoint every N optimizer steps, or every 'epoch'.")
    checkpoints_total_limit: int | None = flag(
        None, "Number of newest checkpoints to keep, in addition to the best one."
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "A checkpoint directory, or 'latest', which starts from scratch if there is none, so a job can always use it.",
    )
    trust_checkpoint: bool = flag(
        False,
        "Resume even if the checkpoint contains pickles that can run code; only for checkpoints you made yourself.",
    )


@dataclass(kw_only=True)
class TrackingArguments:
    """Logs, trackers and the Hub."""

    logging_steps: int = flag(10, "Optimizer steps between two log rows.")
    with_tracking: bool = flag(False, "Log to every installed tracker, or to those of --report_to.")
    report_to: str = flag("none", "trackio | tensorboard | wandb | ... | none")
    logging_dir: str | None = flag(None, "Directory for tracker logs; output_dir by default.")
    push_to_hub: bool = flag(False, "Upload the trained model; log in first with: hf auth login")
    hub_model_id: str | None = flag(None, "Repository to upload to, e.g. me/vit-hard.")
    hub_private_repo: bool = flag(True, "Make the repository private; --no_hub_private_repo makes it public.")


@dataclass(kw_only=True)
class LoopArguments(OptimizationArguments, EvaluationArguments, OutputArguments, TrackingArguments):
    """Everything about the run itself."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best model is kept rather than the last."""
        return self.load_best_model_at_end or self.early_stopping_patience > 0


@dataclass(kw_only=True)
class ScriptArguments(ModelArguments, HardAttentionArguments, DataArguments, LoopArguments):
    """All shared flags."""


def validate(args: ScriptArguments) -> None:
    """Raise for invalid values that the types do not exclude.

    Raises:
        HardAttentionError: a count below 1, a share outside [0, 1), a checkpoint interval that is neither a count nor 'epoch', or settings
            of the schedule that are not a mapping.
    """
    for name in (
        *("logging_steps", "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
        *("max_train_steps", "eval_steps", "checkpoints_total_limit", "num_validation_examples"),
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise HardAttentionError(f"{name}={value} is out of range; it must be a count, >= 1.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise HardAttentionError(f"{name}={getattr(args, name)} is out of range; it must be in [0, 1).")
    schedule_settings(args)
    interval = args.checkpointing_steps
    if interval is not None and interval != "epoch" and not (interval.isdigit() and int(interval)):
        raise HardAttentionError(
            f"checkpointing_steps={interval!r} is not a valid interval; use a number of optimizer steps, or 'epoch'."
        )
    if args.train_selectors_only and args.use_peft:
        raise HardAttentionError(
            "--train_selectors_only would leave the LoRA adapters untrained; remove it or --use_peft."
        )
    if args.push_to_hub and not args.hub_model_id:  # raise now, not after the training
        raise HardAttentionError("--push_to_hub needs a repository; specify it with --hub_model_id me/my-model.")


def schedule_settings(args: LoopArguments) -> dict[str, Any]:
    """Parse ``lr_scheduler_kwargs``.

    Raises:
        HardAttentionError: it is not a JSON mapping.
    """
    try:
        found = json.loads(args.lr_scheduler_kwargs or "{}")
    except json.JSONDecodeError as error:
        raise HardAttentionError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} is not valid JSON; {error}."
        ) from error
    if not isinstance(found, dict):
        raise HardAttentionError(
            f'lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} is not a mapping; give the settings by name, e.g. {{"num_cycles": 2}}.'
        )
    return found
