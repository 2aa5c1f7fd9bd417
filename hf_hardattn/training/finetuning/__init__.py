"""Tasks of the training scripts. One file each; the file name is what ``--task`` takes.

A task says how the rows of a user's data become a model's inputs, what the model predicts from them, and how that is scored. The
tasks of ``training/tasks`` make their data from nothing, for ``hf-hardattn compare``; these read it.
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
    """Flags of every task, besides the shared ones."""

    task: str | None = flag(None, "What the model learns; the family's first by default.")
    freeze: list[str] | None = flag(None, "Modules that do not learn, e.g. vision_model; selectors in them still do.")


class Base:
    """A task.

    Class attributes:
        families: whose command has it: vit, t5, blip, encoder, decoder. model_class: its stock Transformers class.
        first: the family whose command runs this task when none is named.
        Arguments: dataclass of its flags.
        processor_class: loads its tokenizer or image processor. heads: modules that may be new where the checkpoint's do not fit.
        adapters: modules that get a LoRA adapter by default.

    Args:
        args: the parsed flags. accelerator: of the run.
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
        """Whether the class that a saved model names in its config.json is one that this task trains."""
        name: str = cls.model_class.__name__
        return name == architecture

    def columns(self, data: Dataset) -> None:
        """Find the columns, by their flags or by their usual names.

        Raises:
            HardAttentionError: a column is missing; the message lists those that exist.
        """
        raise NotImplementedError

    def prepare(self, data: Dataset, file: str | None) -> Dataset:
        """Bring the data into the form that ``collate`` reads; ``file`` is the csv or json file that it came from, or None."""
        return data

    def changes(self, training: Dataset | None) -> dict[str, Any]:
        """What the training data decides about the model's configuration."""
        return {}

    def build(self, config: PreTrainedConfig, processor: Any) -> None:
        """Keep what ``collate`` needs of the configuration and the processor.

        Raises:
            HardAttentionError: they do not belong together.
        """
        self.config, self.processor = config, processor

    def check_row(self, row: dict[str, Any]) -> None:
        """Raise HardAttentionError for a row that ``collate`` could not read, at the least cost."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows to a batch of the model's keyword inputs, labels included."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[Any], list[Any], list[float]]:
        """Predictions, references and losses of a batch, an entry per example."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """All predictions and references to named numbers."""
        raise NotImplementedError

    def setup(self) -> Task:
        """Read and check the data, build the model: everything that can fail fails here, before the training."""
        args = self.args
        if args.config_name or args.model_name_or_path:
            load_config(args, self.model_class)  # a model that is not there is told before the data are read
        training, validation = load_splits(args)
        splits = {
            "training": (training, args.train_file),
            "validation": (validation, args.validation_file or args.train_file),
        }
        found = {name: data for name, (data, _) in splits.items() if data is not None}
        if not found:
            raise HardAttentionError("there is no data; name it with --dataset_name, --train_dir or --train_file.")
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
    """Take the parameters of ``modules`` out of the training; selectors in them still learn.

    Raises:
        HardAttentionError: there is no such module.
    """
    names = dict(model.named_parameters())
    for module in modules:
        under = [name for name in names if f".{module}." in f".{name}"]  # PEFT puts its own names in front
        if not under:
            raise unknown("module", module, [name for name, _ in model.named_children()], "--freeze")
        for name in under:
            if "selector" not in name:
                names[name].requires_grad_(False)


def names(family: str | None = None) -> tuple[str, ...]:
    """Names of the tasks, or of those of a model family."""
    found = registry.names("training.finetuning")
    return found if family is None else tuple(name for name in found if family in load(name).families)


def load(name: str) -> type[Base]:
    """The task ``name``.

    Raises:
        HardAttentionError: no such task; the message lists those that exist.
    """
    if name not in names():
        raise unknown("task", name, names())
    task: type[Base] = registry.load("training.finetuning", name)
    return task


def choose(words: Sequence[str], family: str, architecture: str | None = None) -> type[Base]:
    """The task that expanded command line ``words`` name with ``--task``, or the one that the model says.

    Args:
        family: of the script. architecture: class that a saved model names in its config.json.

    Raises:
        HardAttentionError: no such task in the family; the message lists those that exist.
    """
    known, wanted = names(family), peek(words, "task")
    if wanted is not None:
        if wanted not in known:
            raise unknown(f"task of {family}", wanted, known)
        return load(wanted)
    tasks = sorted(map(load, known), key=lambda task: task.first != family)
    return next((task for task in tasks if task.trains(architecture)), tasks[0])
