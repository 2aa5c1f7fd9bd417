"""The training loop of the scripts, for one or several processes on CPU or GPU, with resume after an interruption."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, send_to_device
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..distributions.noise import keyed, mix_number
from ..errors import HardAttentionError
from ..inspection.random_control import beside_random
from ..models import family_of
from . import checkpoints
from .arguments import ScriptArguments, schedule_settings
from .driver import Driver
from .evaluation import Predict, Score, measure
from .interruption import TERMINATED, Interruption
from .models import parameter_groups
from .order import Order, Streamed
from .pictures import draw
from .results import Log
from .sharding import check_warmup, name_fsdp_units, without_peft

logger = get_logger(__name__)


@dataclass
class Task:
    """The task of a script as the loop needs it.

    Attributes:
        name: name of the task, for ``results.json``.
        model, processor: the processor is saved with the model.
        train, validation: data, streamed or not; rows are passed to ``collate`` unchanged.
        collate: maps rows to a batch of the model's keyword inputs, including labels.
        predict: maps the model and a batch to predictions, references and losses, one list entry per example.
        score: maps all predictions and references to metrics by name.
        augment: changes a training batch, or None; it may draw from torch's generator.
    """

    name: str
    model: nn.Module
    processor: Any
    train: Dataset | IterableDataset | None
    validation: Dataset | IterableDataset | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    predict: Predict
    score: Score
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None


class Training:
    """A run from its present step to its last.

    The examples of the whole training have one order, and optimizer step ``s`` reads those from ``s * batch`` on, where ``batch`` is
    the number of examples over all devices and micro-batches. A step therefore depends on its number and on ``batch``, but not on the
    number of processes: data, noise and schedules need no state, and a run can be resumed on another number of devices with the same
    ``batch``.

    Args:
        accelerator, args, task: the arguments of ``running.train``.
    """

    def __init__(self, accelerator: Accelerator, args: ScriptArguments, task: Task) -> None:
        self.accelerator, self.args, self.task = accelerator, args, task
        self.accumulation = accelerator.gradient_accumulation_steps
        self.batch = args.per_device_train_batch_size * accelerator.num_processes * self.accumulation
        self.examples = len(task.train) if isinstance(task.train, Dataset) else None
        if args.max_train_steps is None and self.examples is None:
            raise HardAttentionError(
                "the training data is streamed, so the length of an epoch is unknown; pass --max_train_steps."
            )
        self.steps = args.max_train_steps or math.ceil(args.num_train_epochs * (self.examples or 0) / self.batch)
        check_warmup(accelerator.distributed_type, args.selector_warmup_steps)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        self.order = Streamed(task.train) if self.examples is None else Order(self.examples, data_seed)
        name_fsdp_units(accelerator, task.model)
        self.model, self.optimizer, self.batches = accelerator.prepare(
            task.model,
            torch.optim.AdamW(
                parameter_groups(task.model, args),
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            ),
            _loader(args, task.train, task, args.per_device_train_batch_size, self.order),
        )
        self.inner = accelerator.unwrap_model(self.model)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            args.num_warmup_steps,
            self.steps,
            scheduler_specific_kwargs=schedule_settings(args),
        )
        self.driver = Driver(self.inner, args.selector_warmup_steps, self.steps)
        self.run = checkpoints.RunState(
            {"batch of all devices": self.batch, "training examples": self.examples or 0, "seed": args.seed}
            | ({} if args.data_seed is None else {"data_seed": args.data_seed})
        )
        accelerator.register_for_checkpointing(self.scheduler, self.driver, self.run)
        if args.resume_from_checkpoint:
            checkpoints.resume(accelerator, args.output_dir, args.resume_from_checkpoint, args.trust_checkpoint)
            self._set_rate()
        self.log = Log(Path(args.output_dir) / "log.jsonl", self.run.step) if accelerator.is_main_process else None
        if accelerator.log_with:
            plain = {k: v for k, v in asdict(args).items() if isinstance(v, (str, int, float, bool))}
            accelerator.init_trackers("hf_hardattn", config=plain)
        self.saved = self.run.step
        self.loss: float | None = None

    def _set_rate(self) -> None:
        """Set the learning rate of this step; the schedule may be longer than that of the interrupted run."""
        if isinstance(self.scheduler, LambdaLR):
            rates = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
            for group, (base, factor) in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * factor(self.scheduler.last_epoch)

    def run_steps(self, interruption: Interruption) -> None:
        """Run the remaining optimizer steps."""
        args, run = self.args, self.run
        logger.info(
            "%s examples, %d optimizer steps (%s epochs) of %d x %d x %d examples (device x processes x accumulation)",
            "streamed" if self.examples is None else self.examples,
            self.steps,
            "?" if self.examples is None else f"{self.steps * self.batch / self.examples:.2f}",
            args.per_device_train_batch_size,
            self.accelerator.num_processes,
            self.accumulation,
        )
        self.order.start, self.order.stop = run.step * self.batch, self.steps * self.batch
        bar = tqdm(total=self.steps, initial=run.step, desc="train", disable=not self.accelerator.is_local_main_process)
        if args.eval_on_start and run.step == 0 and self.task.validation is not None:
            self.evaluate()
        started, before, ended = time.perf_counter(), run.seconds, False
        self.model.train()
        for micro_batches in _windows(self.batches, self.accumulation):
            if run.step >= self.steps:
                break
            self.take(micro_batches)
            bar.update()
            if run.step % args.logging_steps == 0 or run.step == self.steps:
                bar.set_postfix(loss=f"{self.write_log():.4f}")
            run.seconds = before + time.perf_counter() - started
            ended = self.look_around()
            if run.step < self.steps and interruption.requested():
                if self.saved != run.step:
                    self.save()
                logger.info("SIGTERM: stopped after step %d; continue with --resume_from_checkpoint latest", run.step)
                self.accelerator.end_training()
                raise SystemExit(TERMINATED)
            if ended:
                logger.info(
                    "stopped early: %s has not improved since step %s", args.metric_for_best_model, run.best_step
                )
                break
        if run.step < self.steps and not ended:
            raise HardAttentionError(f"the stream of training data ended before step {run.step}; it holds no rows.")
        bar.close()

    def take(self, micro_batches: list[dict[str, Any]]) -> None:
        """Take one optimizer step."""
        accelerator, args, run, task = self.accelerator, self.args, self.run, self.task
        for index, (batch, share) in enumerate(zip(micro_batches, self.shares(micro_batches), strict=True)):
            self.driver.begin_step(run.step, share)
            turn = (run.step * self.accumulation + index) * accelerator.num_processes + accelerator.process_index
            first = turn * args.per_device_train_batch_size
            torch.manual_seed(mix_number(mix_number(args.seed) ^ first) >> 1)  # dropout, augmentation
            places = torch.arange(first, first + args.per_device_train_batch_size, device=accelerator.device)
            with accelerator.accumulate(self.model), keyed(args.seed, places):
                loss = self.model(**(task.augment(batch) if task.augment else batch)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self.driver.before_update()
                    if args.max_grad_norm:
                        accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            run.loss, run.losses = run.loss + loss.detach().float(), run.losses + 1
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        run.step += 1

    def shares(self, micro_batches: list[dict[str, Any]]) -> list[Tensor | None]:
        """Weight of each micro-batch's mean loss: its share of the step's labels, divided by the mean share.

        The loss of a model is the mean over the labels of its inputs, and micro-batches of texts hold different numbers of labels;
        without these weights a step would depend on how its batch is split. None if every example has one label.
        """
        model = without_peft(self.inner)
        architecture, parts = family_of(model), self.accumulation * self.accelerator.num_processes
        if parts == 1 or architecture is None:
            return [None] * len(micro_batches)
        labels = [architecture.labels(model, batch) for batch in micro_batches]
        if any(found is None or found.shape[1] == 1 for found in labels):
            return [None] * len(micro_batches)
        counts = torch.stack([(found != -100).sum() for found in labels if found is not None]).float()
        total = self.accelerator.reduce(counts.sum(), "sum")
        return list(counts * parts / total.clamp(min=1))

    def write_log(self) -> float:
        """Log the mean loss since the last row, over all processes, and return it."""
        run, accelerator = self.run, self.accelerator
        self.loss = float(accelerator.reduce(torch.as_tensor(run.loss / run.losses, device=accelerator.device), "mean"))
        run.loss, run.losses = 0.0, 0
        row = {**self.place(), "loss": self.loss, "learning_rate": self.scheduler.get_last_lr()[0]}
        self.write({**row, **self.driver.logs()})
        return self.loss

    def look_around(self) -> bool:
        """Run the evaluations, pictures and checkpoints that are due. Return True to stop early."""
        args, run, task = self.args, self.run, self.task
        last, epoch_ended = run.step == self.steps, self.epochs(run.step) > self.epochs(run.step - 1)
        stop = False
        if args.validation_steps and run.step % args.validation_steps == 0:
            draw(self.accelerator, self.inner, task, args, run.step)
        timely = run.step % args.eval_steps == 0 if args.eval_steps else args.evaluate_each_epoch and epoch_ended
        if task.validation is not None and (timely or (last and args.keeps_best)) and (args.keeps_best or not last):
            found = self.evaluate()
            stop = args.keeps_best and self.judge(found)
        every = args.checkpointing_steps or ""
        if (run.step % int(every) == 0) if every.isdigit() else every == "epoch" and (epoch_ended or last or stop):
            self.save()
        return stop

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the model at the present step and log the result."""
        found = measure_on(self.accelerator, self.args, self.task, self.model, measure)
        row = {**self.place(), **{f"eval_{name}": value for name, value in found.items()}, **self.control()}
        logger.info("%s", row)
        self.write(row)
        return found

    def control(self) -> dict[str, float]:
        """Effect of random selections of equal size on the first validation rows; empty if weights are sharded."""
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if sharded or self.task.validation is None or not self.driver.selectors:
            return {}
        rows = list(itertools.islice(iter(self.task.validation), self.args.per_device_eval_batch_size))
        with torch.random.fork_rng():
            batch = send_to_device(self.task.collate(rows), self.accelerator.device)
            found = beside_random(self.inner, batch, seed=self.run.step)
        return {f"hardattn/{name}": value for name, value in found.items()}

    def judge(self, found: dict[str, Any]) -> bool:
        """Update the best model after an evaluation. Return True when the patience of early stopping is exhausted."""
        args, run = self.args, self.run
        name = args.metric_for_best_model or next(iter(found))
        value = found.get(name)
        if not isinstance(value, (int, float)):
            known = ", ".join(key for key, value in found.items() if isinstance(value, (int, float)))
            raise HardAttentionError(f"--metric_for_best_model {name} is not measured; available: {known}.")
        args.metric_for_best_model = name
        sign = -1 if args.lower_is_better or name == "loss" else 1
        if run.best is None or sign * value > sign * run.best:
            run.best, run.best_step, run.waited = value, run.step, 0
            checkpoints.save(self.accelerator, args.output_dir, run, best=True)
            return False
        run.waited += 1
        return bool(args.early_stopping_patience) and run.waited >= args.early_stopping_patience

    def save(self) -> None:
        """Save a checkpoint."""
        checkpoints.save(self.accelerator, self.args.output_dir, self.run, self.args.checkpoints_total_limit)
        self.saved = self.run.step

    def epochs(self, step: int) -> int:
        """Number of epochs that are complete after ``step`` steps."""
        return 0 if self.examples is None else step * self.batch // self.examples

    def place(self) -> dict[str, Any]:
        """Present step and epoch, the first fields of each log row."""
        epoch = {} if self.examples is None else {"epoch": self.run.step * self.batch / self.examples}
        return {"step": self.run.step, **epoch}

    def write(self, row: dict[str, Any]) -> None:
        """Write a row to the log and to the trackers."""
        self.accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=self.run.step)
        if self.log:
            self.log.write(row)

    def summary(self) -> dict[str, Any]:
        """Record of the training for ``results.json``."""
        run = self.run
        found: dict[str, Any] = {"loss": self.loss, "steps": run.step, "epochs": self.place().get("epoch")}
        found |= {"seconds": run.seconds, "batch": self.batch}
        if run.best_step is not None:
            found["best"] = {"step": run.best_step, "metric": self.args.metric_for_best_model, "value": run.best}
        return found


def measure_on(
    accelerator: Accelerator, args: ScriptArguments, task: Task, model: nn.Module, how: Any
) -> dict[str, Any]:
    """Evaluate a model on the validation data with ``evaluation.measure`` or ``evaluation.compare``."""
    loader = accelerator.prepare_data_loader(_loader(args, task.validation, task, args.per_device_eval_batch_size))
    return how(accelerator, model, loader, task.predict, task.score)


def _windows(batches: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the micro-batches of each optimizer step."""
    remaining = iter(batches)
    while window := list(itertools.islice(remaining, size)):
        if len(window) == size:
            yield window


def _loader(args: ScriptArguments, data: Any, task: Task, batch_size: int, order: Any = None) -> DataLoader[Any]:
    # the loader has its own generator: each iteration draws a seed, which must not affect the noise of the model
    return DataLoader(
        order if isinstance(order, Streamed) else data,
        sampler=order if isinstance(order, Order) else None,
        batch_size=batch_size,
        collate_fn=task.collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
    )
