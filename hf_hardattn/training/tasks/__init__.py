"""Tasks of ``hf-hardattn compare``. Each has a file of its own, whose name is the registered name.

A task is small enough to be learned from scratch on one CPU core, its signal is sparse, and its difficulty is adjustable, so that it
separates one estimator from another, and a learned selection from a random one.
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

TEST_SEED = 2**40  # seed of generated test sets; no training uses it


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training. All variants share the soft base checkpoint and train ``branch_steps`` from it.

    Attributes:
        trunk_steps, branch_steps: optimizer steps of the base checkpoint, and of each branch from it. batch: examples per step.
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
    """A batch of test examples.

    Attributes:
        inputs: keyword inputs of the model, including ``labels`` if it computes a loss.
        gold: bool ``[B, Q, N]``, the candidates of the task's site that hold the answer (Q = 1 if all queries of a row share a
            selection); None if they are unknown.
    """

    inputs: dict[str, Tensor]
    gold: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return Batch(send_to_device(self.inputs, device), send_to_device(self.gold, device))


class Base:
    """Base class of the tasks.

    Class attributes:
        model_class: stock Transformers class.
        site, scorer, scorer_options, budget: the recommended hard attention; ``budget`` is the ratio of positions to keep.
        recipe: the recommended training.
        metric: the main metric of ``evaluate``, higher = better. points: factor that converts it to points out of 100.
        one_is_enough: whether one position of ``gold`` holds the whole answer.
        samples: number of draws for the Monte-Carlo metric ``<metric>_mc<samples>``, reported beside the metric of the likeliest
            selection; 0 for none.

    The arguments of a subclass are keyword options, all with defaults.
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
        """Whether ``reduced`` can shorten the inputs: images, and rows of tokens that the model reads whole."""
        return self.site in ("vision.inputs", "encoder.inputs", "text.inputs")

    def reduced(self, inputs: dict[str, Any], ratio: float) -> dict[str, Any]:
        """Reduce the inputs to the number of rows that a budget of ``ratio`` keeps: images are downsampled by area, texts truncated.

        Args:
            inputs: inputs of the model, with ``pixel_values`` or ``input_ids``. ratio: in (0, 1].
        """
        if "pixel_values" not in inputs:
            ids = inputs["input_ids"]
            kept = max(1, round(ratio * (ids.shape[1] - 1)))
            return {**inputs, "input_ids": torch.cat([ids[:, :kept], ids[:, -1:]], 1)}  # the last token is </s>
        config: Any = self.config()
        patches = max(1, round(ratio**0.5 * config.image_size / config.patch_size))
        size = (patches * config.patch_size,) * 2
        pixels = functional.interpolate(inputs["pixel_values"], size=size, mode="area")
        return {**inputs, "pixel_values": pixels, "interpolate_pos_encoding": True}

    def config(self) -> PreTrainedConfig:
        """Return the model's configuration."""
        raise NotImplementedError

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        """Draw a training batch.

        Args:
            size: number of examples B.
            generator: CPU generator; equal states give equal batches.
            difficulty: in [0, 1]; tasks without degrees of difficulty ignore it.

        Returns:
            Keyword inputs of the model, including labels.
        """
        raise NotImplementedError

    def test(self) -> Iterator[Batch]:
        """Yield the test set in batches; it is the same at each call."""
        raise NotImplementedError

    def predict(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Any]:
        """Predictions for a batch; by default the likeliest class at each labelled position."""
        return model(**inputs).logits.argmax(-1)[inputs["labels"] != -100].tolist()

    def predict_drawn(self, model: PreTrainedModel, inputs: dict[str, Tensor], samples: int) -> list[Any]:
        """Like ``predict``, but from the label probabilities averaged over ``samples`` drawn selections."""
        with sampled(model):
            drawn = torch.stack([model(**inputs).logits.float().softmax(-1) for _ in range(samples)])
        return drawn.mean(0).argmax(-1)[inputs["labels"] != -100].tolist()

    def references(self, inputs: dict[str, Tensor]) -> list[Any]:
        """Return the references that ``predict`` is compared with."""
        labels = inputs["labels"]
        return labels[labels != -100].tolist()

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Metrics by name; by default the accuracy, in [0, 1]."""
        return accuracy(predictions, references)

    def processor(self) -> PreTrainedTokenizerBase | None:
        """Return the processor that is saved with the model; None if the inputs are generated."""
        return None

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, batches: int | None = None) -> dict[str, float]:
        """Test ``model`` on its device, in evaluation mode, on the first ``batches`` batches of the test set or on all.

        Returns:
            The metrics of ``score``; for a hard model also ``kept``, the mean share of candidates kept at the task's site and, if
            the gold positions are known, ``precision`` and ``recall`` of the kept candidates; all in [0, 1]. With ``samples`` also
            the main metric of the Monte-Carlo prediction.
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
                    found.add(selection, batch.gold if whole else None)  # there is no gold for a step of generate()
                if self.samples:
                    drawn += self.predict_drawn(model, batch.inputs, self.samples)
            references += self.references(batch.inputs)
        metrics = self.score(predictions, references)
        if drawn:
            metrics[f"{self.metric}_mc{self.samples}"] = self.score(drawn, references)[self.metric]
        return {**metrics, **found.metrics()}


def names() -> tuple[str, ...]:
    """Return the names of the tasks."""
    return registry.names("training.tasks")


def load(name: str, options: Mapping[str, Any] | None = None) -> Base:
    """Create the task ``name``.

    Raises:
        HardAttentionError: no such task, or an option that it does not have; the message lists the existing ones.
    """
    if name not in names():
        raise unknown("task", name, names())
    member = registry.load("training.tasks", name)
    known = inspect.signature(member).parameters
    for option in options or {}:
        if option not in known:
            raise unknown(f"option of task '{name}':", option, known)
    return member(**(options or {}))
