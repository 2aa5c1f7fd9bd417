"""Gradient estimators for the discrete selection. Each has its own file, whose name is the registered name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..functional.topk import topk_mask
from ..options import Configurable

# What an estimator may need besides the scores.
NEEDS = {
    "gates": "the gradient at dropped positions: trains masked",
    "reward": "a reward per example: minus its loss, or your own",
    "passes": "several sampled forward passes per step",
    "choices": "a forward pass for every possible selection, at one site of the model",
    "teacher": "a soft forward pass per step, without gradient",
    "target": "the labels, in training",
    "class": "the class of each example, in training",
}
WITHOUT_TERMS = {
    "gates",
    "passes",
}  # needs that the forward passes meet; what meets the others reaches the model's loss as a term


@dataclass
class Choice:
    """The choice of an estimator for rows ``[..., N]``.

    Attributes:
        mask: bool ``[..., N]``, the kept positions, exactly ``min(k, valid)`` per row (unless ``exact_budget`` is False).
        gates: fp32 ``[..., N]`` or None; equal to ``mask`` in the forward pass (a relaxation may differ), with a gradient to the scores.
        log_prob: fp32 ``[...]`` or None; log-probability of ``mask`` (or of the order drawn) under the sampling law.
        entropy: fp32 ``[...]`` or None; entropy of the sampling law, in nats.
        penalty: fp32 ``[...]`` or None; a term of the training loss, averaged over rows.
    """

    mask: Tensor
    gates: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    penalty: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How a training choice is drawn.

    Attributes:
        uniform: draws fp32 noise in (0, 1) of a given shape, on the device of the scores.
        temperature: > 0; divides the scores of the sampling law, or of a relaxation that is used in the forward pass.
        backward_temperature: > 0, a number or fp32 ``[..., 1]``; temperature of a surrogate that is used only for the gradient.
            None: ``temperature``.
        exploration: in [0, 1]; probability that a row keeps positions drawn uniformly.
        posterior: fp32 ``[..., N]`` scores of the inference network, for estimators that need ``target``.
        class_loss: for estimators that need ``class``: maps weights of the candidates, fp32 ``[..., N]``, to the loss, fp32 ``[...]``,
            of an auxiliary head that reads the weighted candidates.
    """

    uniform: Callable[[tuple[int, ...]], Tensor]
    temperature: float = 1.0
    backward_temperature: float | Tensor | None = None
    exploration: float = 0.0
    posterior: Tensor | None = None
    class_loss: Callable[[Tensor], Tensor] | None = None

    @property
    def backward(self) -> float | Tensor:
        """The temperature of the surrogate that is used for the gradient."""
        return self.temperature if self.backward_temperature is None else self.backward_temperature

    def explores(self, rows: Tensor) -> Tensor | None:
        """Return which rows explore, bool of the shape of ``rows``, or None if ``exploration`` is 0."""
        return self.uniform(tuple(rows.shape)) < self.exploration if self.exploration > 0 else None


class Estimator(Configurable, nn.Module):
    """Base class of the estimators. A subclass sets the attributes below, takes its options in ``__init__``, and defines ``sample``.

    Class attributes:
        biased: whether the expected gradient differs from the exact one.
        needs: keys of ``NEEDS``.
        trains_gathered: whether training uses gathered execution, which saves compute; it follows from ``needs``.
        exact_budget: whether a training choice keeps exactly the budget (evaluation always does).
        detaches: whether the scorer's input is detached, so that the selector's loss does not reach the backbone.
        run_state: names of attributes that describe the run and not the model, as in ``Baseline``.
        source: paper and equation.
        caution: maps an option (``"name=value"``), or ``"default"`` for the estimator with its defaults, to its known problems; shown
            by ``hf-hardattn list``.
        former_defaults: maps a schema version of saved configurations to the options that had other defaults in that version and
            in earlier ones; applied by ``saved_options``.
    """

    kind = "estimator"
    biased: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]] = ()
    trains_gathered: ClassVar[bool]
    exact_budget: ClassVar[bool] = True
    detaches: ClassVar[bool] = False
    run_state: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str]
    caution: ClassVar[Mapping[str, str]] = {}
    former_defaults: ClassVar[Mapping[int, Mapping[str, Any]]] = {}

    def __init_subclass__(cls) -> None:
        cls.trains_gathered = "gates" not in cls.needs

    @classmethod
    def saved_options(cls, options: Mapping[str, Any], schema_version: int) -> dict[str, Any]:
        """Add the defaults of its schema version to the options of a saved configuration, so that it keeps its meaning.

        A saved configuration holds the options that were set, but not the defaults of the others. Call this once, on a
        configuration that was read from a file; a configuration that a user writes uses the current defaults.

        Args:
            options: as saved.
            schema_version: of the configuration that was read.

        Examples:
            >>> StraightThrough.saved_options({}, schema_version=1)
            {'surrogate': 'sigmoid'}
        """
        completed = dict(options)
        for version in sorted(cls.former_defaults):
            if schema_version <= version:
                completed = {**cls.former_defaults[version], **completed}
        return completed

    @property
    def samples(self) -> int:
        """Number of sampled forward passes per training step."""
        return 1

    def advantage(self, reward: Tensor, others: Tensor) -> Tensor:
        """Return the weight of a sample's log-probability gradient: its reward minus the mean of the other samples'.

        Args:
            reward: fp32 ``[B]``, rewards of the sample; higher = better.
            others: fp32 ``[M, B]``, rewards of the other samples of the same examples.

        Returns:
            fp32 ``[B]``.
        """
        return reward - others.sum(0) / max(len(others), 1)

    def reset_parameters(self) -> None:
        """Initialise the parameters, if the estimator has any."""

    def choose(
        self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling | None = None
    ) -> Choice:
        """Choose ``k`` of the valid positions of each row.

        A row without a choice (``k`` is 0, nothing is valid, or everything valid is kept) keeps nothing or everything
        valid. The gradient of its scores is exactly zero, but it is not None.

        Args:
            scores: fp32 ``[..., N]``, finite, N >= 1; higher = keep.
            k: int64 ``[...]``, number of positions to keep; rows with fewer valid ones keep them all.
            valid: bool ``[..., N]``; False positions are never kept.
            slots: >= 0, static upper bound of the number of positions that a row keeps; a larger ``k`` counts as ``slots``.
            sampling: how to draw in training; None uses the deterministic top-k, whatever the estimator.

        Returns:
            The choice, with exactly ``min(k, valid, slots)`` positions per row (unless ``exact_budget`` is False).
        """
        # A row's count can exceed the bound if a relaxation at an earlier site left more rows than its budget. The bound is 0
        # if a row consists of its protected position only; estimators then get one slot, with k = 0.
        k, slots = k.clamp(max=slots), max(1, min(slots, scores.shape[-1]))
        if sampling is None:
            return Choice(topk_mask(scores, k, valid, slots))
        choice = self.sample(scores, k, valid, slots=slots, sampling=sampling)
        explores = None if choice.gates is None else sampling.explores(k.expand(scores.shape[:-1]))
        if explores is not None and choice.gates is not None:
            mask = topk_mask(sampling.uniform(tuple(scores.shape)), k, valid, slots)
            choice.mask = choice.mask.where(~explores.unsqueeze(-1), mask)
            # The values of the new choice with the gradient of the old one, so that the surrogate learns from exploration.
            gates = choice.mask + (choice.gates - choice.gates.detach())
            choice.gates = choice.gates.where(~explores.unsqueeze(-1), gates)
        return choice

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose in training; the arguments are those of ``choose``. For estimators with gates, ``choose`` adds the exploration;
        estimators with log-probabilities sample it themselves."""
        raise NotImplementedError
