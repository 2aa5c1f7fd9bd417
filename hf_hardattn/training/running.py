"""The steps of a training script: set up, train or evaluate, save, and record the results."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import enable_full_determinism

from ..errors import HardAttentionError
from . import checkpoints
from .arguments import ScriptArguments
from .evaluation import compare
from .interruption import Interruption
from .loop import Task, Training, measure_on
from .publishing import push, save_model
from .results import describe_data, describe_model, describe_run, write_json
from .summary import summarise

logger = get_logger(__name__)


def start(args: ScriptArguments) -> Accelerator:
    """Set up processes, logging and seeds.

    Raises:
        HardAttentionError: ``output_dir`` cannot be written to.
    """
    checkpoints.check_writable(args.output_dir)
    tracked = "all" if args.with_tracking and args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        # the batches of the loop are never short, so the end of the loader must not trigger an optimizer step
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # each process reads its own share of a stream; the main process could only dispatch rows of one shape
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        log_with=None if tracked == "none" else tracked,
        project_dir=args.logging_dir or args.output_dir,
    )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("hf_hardattn").setLevel(level)
    set_seed(args.seed)
    if args.full_determinism:
        enable_full_determinism(args.seed)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    return accelerator


def train(accelerator: Accelerator, args: ScriptArguments, task: Task, argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, save, and return the content of ``results.json``.

    Raises:
        HardAttentionError: there is no data, the checkpoint does not fit, or the disk is full.
        SystemExit: code 143 after SIGTERM; the state is saved, and ``--resume_from_checkpoint latest`` continues from it.
    """
    if task.train is None or (isinstance(task.train, Dataset) and len(task.train) == 0):
        raise HardAttentionError(
            "there is no training data; specify it with --dataset_name, --train_dir or --train_file."
        )
    training = Training(accelerator, args, task)
    try:
        with Interruption(accelerator) as interruption:
            training.run_steps(interruption)
    finally:
        training.driver.close()
    if training.run.best_step is not None:
        checkpoints.best(accelerator, args.output_dir, training.run, args.trust_checkpoint)
        logger.info("keeping the best model, of step %d", training.run.best_step)
    save_model(accelerator, training.model, task.processor, args.output_dir)
    return _finish(accelerator, args, task, training.model, argv, {"train": training.summary()})


def evaluate(
    accelerator: Accelerator, args: ScriptArguments, task: Task, argv: list[str] | None = None
) -> dict[str, Any]:
    """Evaluate a trained model hard and soft, and return the content of ``results.json``."""
    if task.validation is None:
        raise HardAttentionError(
            "there is no evaluation data; specify it with --dataset_name, --validation_dir or --validation_file."
        )
    return _finish(accelerator, args, task, accelerator.prepare_model(task.model, evaluation_mode=True), argv, {})


def _finish(
    accelerator: Accelerator, args: ScriptArguments, task: Task, model: nn.Module, argv: Any, results: dict[str, Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    metrics = {} if task.validation is None else measure_on(accelerator, args, task, model, compare)
    results |= {"task": task.name, "model": args.model_name_or_path, "metrics": metrics}
    results |= {"evaluation_seconds": time.perf_counter() - started, "arguments": asdict(args)}
    plain = accelerator.unwrap_model(model)
    config = plain.config
    results |= {"hard_attention": config.hard_attention, "processes": accelerator.num_processes}
    results |= {"device": str(accelerator.device), "mixed_precision": accelerator.mixed_precision, **describe_run(argv)}
    results |= {"model_commit": getattr(config, "_commit_hash", None), **describe_model(plain, Path(args.output_dir))}
    results |= {"data": describe_data(args, {"train": task.train, "validation": task.validation})}
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "results.json", results)
        tqdm.write(summarise(results, args.output_dir))
    accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:
        push(args)
    accelerator.end_training()
    return results
