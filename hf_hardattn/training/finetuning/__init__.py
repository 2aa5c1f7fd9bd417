"""Tasks of the training scripts. Each has a file of its own, whose name is the value of ``--task``.

A task defines how the rows of a user's data become a model's inputs, what the model predicts from them, and how the predictions are
scored. These tasks read their data; those of ``training/tasks`` generate it, for ``hf-hardattn compare``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import AutoProcessor, PreTrainedConfig

from ... import registry
from ...errors import HardAttentionError, unknown
from ..arguments import ScriptArguments, flag
from ..loop import Task
from ..models import load_config, load_model, processor_source
from ..parsing import peek
from ..rows import check_rows, check_some, same_everywhere
from ..sources import load_splits


@dataclass(kw_only=True)
class TaskArguments(ScriptArguments):
    """Flags that every task has in addition to the shared ones."""

    task: str | None = flag(None, "What the model learns; the family's first by default.")
    freeze: list[str] | None = flag(None, "Modules to freeze, e.g. vision_model; selectors in them are still trained.")


class Base:
    """Base class of the tasks.

    Class attributes:
        families: model families whose command offers the task: vit, t5, blip, encoder, decoder.
        model_class: the stock Transformers class that the task trains.
        first: the family whose command runs this task when none is named.
        Arguments: dataclass of the task's flags.
        processor_class: class that loads the tokenizer or image processor.
        heads: modules that are initialised anew when those of the checkpoint do not fit.
        adapters: modules that get a LoRA adapter by default.

    Args:
        args: the parsed flags. accelerator: the accelerator of the run.
    """

    families: ClassVar[tuple[str, ...]]
    model_class: ClassVar[Any]
    first: ClassVar[str | None] = None
    Arguments: ClassVar[type[TaskArguments]] = TaskArguments
    processor_class: ClassVar[Any] = AutoProcessor
    heads: ClassVar[tuple[str, ...]] = ()
    adapters: ClassVar[tuple[str, ...]]
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __init__(self, args: Any, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator

    @classmethod
    def trains(cls, architecture: str | None) -> bool:
        """Whether this task trains models of the class ``architecture``, which a saved model names in its config.json."""
        name: str = cls.model_class.__name__
        return name == architecture

    def columns(self, data: Dataset) -> None:
        """Find the columns of the data by their flags or by their usual names.

        Raises:
            HardAttentionError: a column is missing; the message lists the existing ones.
        """
        raise NotImplementedError

    def prepare(self, data: Dataset, file: str | None) -> Dataset:
        """Convert the data to the form that ``collate`` reads; ``file`` is the csv or json file it came from, or None."""
        return data

    def changes(self, training: Dataset | None) -> dict[str, Any]:
        """Return the configuration fields that follow from the training data."""
        return {}

    def build(self, config: PreTrainedConfig, processor: Any) -> None:
        """Store the configuration and the processor for ``collate``.

        Raises:
            HardAttentionError: the processor does not belong to the model.
        """
        self.config, self.processor = config, processor

    def check_row(self, row: dict[str, Any]) -> None:
        """Raise HardAttentionError for a row that ``collate`` could not read, with as little work as possible."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Convert rows to a batch of the model's keyword inputs, including labels."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[Any], list[Any], list[float]]:
        """Return the predictions, references and losses of a batch, one entry per example."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Compute the metrics by name from all predictions and references."""
        raise NotImplementedError

    def setup(self) -> Task:
        """Read and check the data and build the model, so that errors are raised here, before the training."""
        args = self.args
        if args.config_name or args.model_name_or_path:
            load_config(args, self.model_class)  # report a missing model before reading the data
        training, validation = load_splits(args)
        splits = {
            "training": (training, args.train_file),
            "validation": (validation, args.validation_file or args.train_file),
        }
        found = {name: data for name, (data, _) in splits.items() if data is not None}
        if not found:
            raise HardAttentionError("there is no data; specify it with --dataset_name, --train_dir or --train_file.")
        for name, data in found.items():
            check_some(data, name)
            self.columns(data)
        found = {name: self.prepare(data, splits[name][1]) for name, data in found.items()}
        same_everywhere(self.accelerator, found)
        config = load_config(args, self.model_class, **self.changes(found.get("training")))
        self.build(config, self.processor_class.from_pretrained(processor_source(args)))
        for name, data in found.items():
            check_rows(self.accelerator, data, name, self.check_row)
        if args.use_peft and args.lora_target_modules is None:
            args.lora_target_modules = list(self.adapters)
        self.model = load_model(args, self.model_class, config, heads=self.heads)
        freeze(self.model, args.freeze or [])
        return Task(
            name=type(self).__module__.rpartition(".")[2],
            model=self.model,
            processor=self.processor,
            train=found.get("training"),
            validation=found.get("validation"),
            collate=self.collate,
            predict=self.predict,
            score=self.score,
            augment=self.augment,
        )


def freeze(model: nn.Module, modules: Sequence[str]) -> None:
    """Exclude the parameters of ``modules`` from the training; selectors inside them still learn.

    Raises:
        HardAttentionError: there is no such module.
    """
    names = dict(model.named_parameters())
    for module in modules:
        under = [name for name in names if f".{module}." in f".{name}"]  # PEFT prepends its own names
        if not under:
            raise unknown("module", module, [name for name, _ in model.named_children()], "--freeze")
        for name in under:
            if "selector" not in name:
                names[name].requires_grad_(False)


def names(family: str | None = None) -> tuple[str, ...]:
    """Return the names of all tasks, or of those of a model family."""
    found = registry.names("training.finetuning")
    return found if family is None else tuple(name for name in found if family in load(name).families)


def load(name: str) -> type[Base]:
    """Return the task ``name``.

    Raises:
        HardAttentionError: no such task; the message lists the existing ones.
    """
    if name not in names():
        raise unknown("task", name, names())
    task: type[Base] = registry.load("training.finetuning", name)
    return task


def choose(words: Sequence[str], family: str, architecture: str | None = None) -> type[Base]:
    """Return the task that the expanded command line ``words`` name with ``--task``, or the one that fits the model.

    Args:
        family: model family of the script. architecture: class that a saved model names in its config.json.

    Raises:
        HardAttentionError: the family has no such task; the message lists the existing ones.
    """
    known, wanted = names(family), peek(words, "task")
    if wanted is not None:
        if wanted not in known:
            raise unknown(f"task of {family}", wanted, known)
        return load(wanted)
    tasks = sorted(map(load, known), key=lambda task: task.first != family)
    return next((task for task in tasks if task.trains(architecture)), tasks[0])
