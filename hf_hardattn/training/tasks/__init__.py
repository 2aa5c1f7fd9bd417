"""Tasks of ``hf-hardattn compare``. One file each; the file name is the registered name.

A task is small enough to be learned from scratch on one CPU core, its signal is sparse, and its difficulty is set: so that an
estimator can be told from another, and a learned choice from a random one.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ... import registry
from ...errors import unknown
from ...modes import sampled
from ...recording import record, selectors
from ..metrics import accuracy
from ._found import Found

TEST_SEED = 2**40  # of test sets that a generator makes: no training's


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training. All variants share the soft base checkpoint, and train ``branch_steps`` from it.

    Attributes:
        trunk_steps, branch_steps: optimizer steps of the base checkpoint and from it. batch: examples a step.
        trunk_warmup, branch_warmup: steps in which the learning rate rises to ``learning_rate``; in the branch it then falls to 0.
        ramp: share of the base checkpoint's training over which the task reaches its full difficulty.
        anneal: share of the branch over which a hard variant's budget falls from everything to its target.
    """

    trunk_steps: int
    branch_steps: int
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    trunk_warmup: int = 50
    branch_warmup: int = 20
    ramp: float = 0.0
    anneal: float = 0.4


@dataclass(frozen=True)
class Batch:
    """Some of the test examples.

    Attributes:
        inputs: keyword inputs of the model; ``labels`` where it computes a loss.
        gold: bool ``[B, Q, N]``, the candidates of the task's site that hold the answer (Q = 1 where a row shares its choice); None
            where nobody knows.
    """

    inputs: dict[str, Tensor]
    gold: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return Batch(send_to_device(self.inputs, device), send_to_device(self.gold, device))


class Base:
    """A task.

    Class attributes:
        model_class: stock Transformers class.
        site, scorer, scorer_options, budget: the recommended hard attention; ``budget`` is a ratio to keep.
        recipe: the recommended training.
        metric: the main one of ``evaluate``, higher = better. points: what turns it into points of a hundred.
        one_is_enough: one position of ``gold`` holds the whole answer.
        samples: draws of the Monte-Carlo metric ``<metric>_mc<samples>`` beside that of the likeliest choice; 0: none.

    Args of a subclass: keyword options, all with defaults.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    site: ClassVar[str]
    scorer: ClassVar[str] = "auto"
    scorer_options: ClassVar[dict[str, Any]] = {}
    budget: ClassVar[float]
    recipe: ClassVar[Recipe]
    metric: ClassVar[str] = "accuracy"
    points: ClassVar[float] = 100.0
    one_is_enough: ClassVar[bool] = False
    samples: ClassVar[int] = 0

    @property
    def reduces(self) -> bool:
        """Whether ``reduced`` knows how to shorten its inputs: images, and rows of tokens that are read whole."""
        return self.site in ("vision.inputs", "encoder.inputs", "text.inputs")

    def reduced(self, inputs: dict[str, Any], ratio: float) -> dict[str, Any]:
        """The inputs with as many rows as a budget of ``ratio`` keeps: images sampled down by area, texts cut off behind their beginning.

        Args:
            inputs: of the model, with ``pixel_values`` or ``input_ids``. ratio: in (0, 1].
        """
        if "pixel_values" not in inputs:
            ids = inputs["input_ids"]
            kept = max(1, round(ratio * (ids.shape[1] - 1)))
            return {**inputs, "input_ids": torch.cat([ids[:, :kept], ids[:, -1:]], 1)}  # the last is </s>
        config: Any = self.config()
        patches = max(1, round(ratio**0.5 * config.image_size / config.patch_size))
        size = (patches * config.patch_size,) * 2
        pixels = functional.interpolate(inputs["pixel_values"], size=size, mode="area")
        return {**inputs, "pixel_values": pixels, "interpolate_pos_encoding": True}

    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        raise NotImplementedError

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        """Draw a training batch.

        Args:
            size: examples B.
            generator: CPU generator; equal states give equal batches.
            difficulty: in [0, 1]; a task without degrees of it takes no notice.

        Returns:
            keyword inputs of the model, labels among them.
        """
        raise NotImplementedError

    def test(self) -> Iterator[Batch]:
        """The test set, the same at each call, in batches."""
        raise NotImplementedError

    def predict(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Any]:
        """Predictions of a batch; by default the likeliest label wherever there is one."""
        return model(**inputs).logits.argmax(-1)[inputs["labels"] != -100].tolist()

    def predict_drawn(self, model: PreTrainedModel, inputs: dict[str, Tensor], samples: int) -> list[Any]:
        """What ``predict`` says, from the mean of the labels' probabilities over ``samples`` drawn choices."""
        with sampled(model):
            drawn = torch.stack([model(**inputs).logits.float().softmax(-1) for _ in range(samples)])
        return drawn.mean(0).argmax(-1)[inputs["labels"] != -100].tolist()

    def references(self, inputs: dict[str, Tensor]) -> list[Any]:
        """What ``predict`` should say."""
        labels = inputs["labels"]
        return labels[labels != -100].tolist()

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Metrics by name; by default the share that is right, in [0, 1]."""
        return accuracy(predictions, references)

    def processor(self) -> PreTrainedTokenizerBase | None:
        """What turns a person's input into the model's, to be saved beside it; None where inputs are made up."""
        return None

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, batches: int | None = None) -> dict[str, float]:
        """Test ``model`` on its device, in evaluation mode, on the first ``batches`` of the test set or on all.

        Returns:
            the metrics of ``score``, and for a hard model ``kept``, the mean share of the candidates that it kept at the task's
            site, with ``precision`` and ``recall`` of what it kept where the gold positions are known; all in [0, 1]. With
            ``samples`` also the main metric of the Monte-Carlo prediction.
        """
        model.eval()
        predictions: list[Any] = []
        drawn: list[Any] = []
        references: list[Any] = []
        found = Found(self.one_is_enough)
        site = next(iter(selectors(model)), None)
        for batch in itertools.islice(self.test(), batches):
            batch = batch.to(model.device)
            if site is None:
                predictions += self.predict(model, batch.inputs)
            else:
                with record(model) as selections:
                    predictions += self.predict(model, batch.inputs)
                once = selectors(model)[site].once
                for selection in selections[site]:
                    whole = once or batch.gold is None or selection.mask.shape[2] == batch.gold.shape[1]
                    found.add(selection, batch.gold if whole else None)  # a step of generate() knows no gold
                if self.samples:
                    drawn += self.predict_drawn(model, batch.inputs, self.samples)
            references += self.references(batch.inputs)
        metrics = self.score(predictions, references)
        if drawn:
            metrics[f"{self.metric}_mc{self.samples}"] = self.score(drawn, references)[self.metric]
        return {**metrics, **found.metrics()}


def names() -> tuple[str, ...]:
    """Names of the tasks."""
    return registry.names("training.tasks")


def load(name: str, options: Mapping[str, Any] | None = None) -> Base:
    """Make the task ``name``.

    Raises:
        HardAttentionError: no such task, or an option it cannot take; the message lists what there is.
    """
    if name not in names():
        raise unknown("task", name, names())
    member = registry.load("training.tasks", name)
    known = inspect.signature(member).parameters
    for option in options or {}:
        if option not in known:
            raise unknown(f"option of task '{name}':", option, known)
    return member(**(options or {}))
