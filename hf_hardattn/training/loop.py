"""The loop that the training scripts share: one process or many, CPU or GPU, interrupted or not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..errors import HardAttentionError
from . import checkpoints
from .arguments import ScriptArguments
from .driver import Driver
from .evaluation import Predict, Score, compare, measure
from .models import parameter_groups
from .publishing import push, save_model
from .results import Log, describe_run, write_json

logger = get_logger(__name__)


@dataclass
class Task:
    """What a script brings.

    Attributes:
        name: of the task, for ``results.json``.
        model, processor: the processor is saved beside the model.
        train, validation: data; rows go to ``collate`` as they are.
        collate: rows to a batch of the model's keyword inputs, labels included.
        predict: the model and a batch to predictions, references and losses, a list entry per example.
        score: all predictions and references to named numbers.
        augment: changes a training batch, or None; it may draw from torch's generator.
    """

    name: str
    model: nn.Module
    processor: Any
    train: Dataset | None
    validation: Dataset | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    predict: Predict
    score: Score
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None


class Order(Sampler[int]):
    """A permutation of ``size`` rows that depends on the seed and the epoch alone, so that a resumed run sees it again."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.round = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.round)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def start(args: ScriptArguments) -> Accelerator:
    """Set up processes, logging and seeds."""
    tracked = "all" if args.with_tracking and args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if tracked == "none" else tracked,
        project_dir=args.output_dir,
    )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("hf_hardattn").setLevel(level)
    set_seed(args.seed)
    return accelerator


def train(accelerator: Accelerator, args: ScriptArguments, task: Task, argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, save, and return what ``results.json`` says."""
    if task.train is None or len(task.train) == 0:
        raise HardAttentionError("there is no training data; name it with --dataset_name, --train_dir or --train_file.")
    started = time.perf_counter()
    order, accumulation = Order(len(task.train), args.seed), args.gradient_accumulation_steps
    model, optimizer, batches = accelerator.prepare(
        task.model,
        torch.optim.AdamW(parameter_groups(task.model, args), lr=args.learning_rate),
        _loader(args, task.train, task, args.per_device_train_batch_size, order),
    )
    steps_per_epoch = math.ceil(len(batches) / accumulation)
    steps = args.max_train_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, steps)
    driver = Driver(accelerator.unwrap_model(model), args.selector_warmup_steps, steps)
    layout = {
        "number of processes": accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "training examples": len(task.train),
        "seed": args.seed,
    }
    run = checkpoints.RunState(layout)
    accelerator.register_for_checkpointing(scheduler, driver, run)
    if args.resume_from_checkpoint:
        checkpoints.resume(accelerator, args.output_dir, args.resume_from_checkpoint)
    log = Log(Path(args.output_dir) / "log.jsonl", run.step) if accelerator.is_main_process else None
    if accelerator.log_with:
        plain = {k: v for k, v in asdict(args).items() if isinstance(v, (str, int, float, bool))}
        accelerator.init_trackers("hf_hardattn", config=plain)
    logger.info(
        "%d examples, %d optimizer steps (%.2f epochs) of %d x %d x %d examples (device x processes x accumulation)",
        len(task.train),
        steps,
        steps / steps_per_epoch,
        args.per_device_train_batch_size,
        accelerator.num_processes,
        accumulation,
    )

    every = args.checkpointing_steps or ""
    interval = int(every) if every.isdigit() else 0
    before, loss_now = run.seconds, None
    bar = tqdm(total=steps, initial=run.step, desc="train", disable=not accelerator.is_local_main_process)
    model.train()
    while run.step < steps:
        order.round, done = divmod(run.step, steps_per_epoch)
        for batch in skip_first_batches(batches, done * accumulation) if done else batches:
            driver.begin_step(run.step)
            with accelerator.accumulate(model):
                loss = model(**(task.augment(batch) if task.augment else batch)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    driver.before_update()
                    if args.max_grad_norm:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            run.loss, run.losses = run.loss + loss.detach().float(), run.losses + 1
            if not accelerator.sync_gradients:
                continue
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            run.step += 1
            bar.update()
            if run.step % args.logging_steps == 0 or run.step == steps:
                loss_now = accelerator.reduce(run.loss / run.losses, "mean").item()
                run.loss, run.losses = 0.0, 0
                row = {"step": run.step, "epoch": run.step / steps_per_epoch, "loss": loss_now}
                row |= {"learning_rate": scheduler.get_last_lr()[0], **driver.logs()}
                bar.set_postfix(loss=f"{loss_now:.4f}")
                accelerator.log(row, step=run.step)
                if log:
                    log.write(row)
            run.seconds = before + time.perf_counter() - started
            if interval and run.step % interval == 0:
                checkpoints.save(accelerator, args.output_dir, run.step, args.checkpoints_total_limit)
            if run.step >= steps:
                break
        if every == "epoch":
            checkpoints.save(accelerator, args.output_dir, run.step, args.checkpoints_total_limit)
        if args.evaluate_each_epoch and task.validation is not None and run.step < steps:
            row = {"step": run.step, "epoch": run.step / steps_per_epoch}
            row |= {f"eval_{k}": v for k, v in _measure(accelerator, args, task, model, measure).items()}
            logger.info("%s", row)
            accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=run.step)
            if log:
                log.write(row)
    bar.close()
    driver.close()

    save_model(accelerator, model, task.processor, args.output_dir)
    trained = {"loss": loss_now, "steps": run.step, "epochs": run.step / steps_per_epoch, "seconds": run.seconds}
    return _finish(accelerator, args, task, model, argv, {"train": trained})


def evaluate(
    accelerator: Accelerator, args: ScriptArguments, task: Task, argv: list[str] | None = None
) -> dict[str, Any]:
    """Evaluate a trained model hard and soft, and return what ``results.json`` says."""
    if task.validation is None:
        raise HardAttentionError(
            "there is no evaluation data; name it with --dataset_name, --validation_dir or --validation_file."
        )
    return _finish(accelerator, args, task, accelerator.prepare_model(task.model, evaluation_mode=True), argv, {})


def _finish(
    accelerator: Accelerator, args: ScriptArguments, task: Task, model: nn.Module, argv: Any, results: dict[str, Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    metrics = {} if task.validation is None else _measure(accelerator, args, task, model, compare)
    results |= {"task": task.name, "model": args.model_name_or_path, "metrics": metrics}
    results |= {"evaluation_seconds": time.perf_counter() - started, "arguments": asdict(args)}
    config = accelerator.unwrap_model(model).config
    results |= {"hard_attention": config.hard_attention, "processes": accelerator.num_processes}
    results |= {"device": str(accelerator.device), "mixed_precision": accelerator.mixed_precision, **describe_run(argv)}
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "results.json", results)
        logger.info("%s -> %s", metrics, Path(args.output_dir) / "results.json")
    accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:
        push(args)
    accelerator.end_training()
    return results


def _measure(accelerator: Accelerator, args: ScriptArguments, task: Task, model: nn.Module, how: Any) -> dict[str, Any]:
    loader = accelerator.prepare_data_loader(_loader(args, task.validation, task, args.per_device_eval_batch_size))
    return how(accelerator, model, loader, task.predict, task.score)


def _loader(args: ScriptArguments, data: Any, task: Task, batch_size: int, order: Order | None = None) -> DataLoader:
    # a generator of its own: a loader draws a seed each time it is iterated, and the model's noise must not notice
    return DataLoader(
        data,
        sampler=order,
        batch_size=batch_size,
        collate_fn=task.collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
    )
