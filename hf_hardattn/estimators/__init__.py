"""Gradient estimators for the discrete selection. One file each; the file name is the registered name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..functional.topk import topk_mask
from ..options import Configurable

# What an estimator may ask for besides the scores.
NEEDS = {
    "gates": "the gradient at dropped positions: trains masked",
    "reward": "a reward of each example: minus its loss, or yours",
    "passes": "several sampled forward passes a step",
    "choices": "a forward pass for every choice, at one site of the model",
    "teacher": "a soft forward pass a step, without gradient",
    "target": "the labels, in training",
    "class": "the class of each example, in training",
}


@dataclass
class Choice:
    """An estimator's answer for rows ``[..., N]``.

    Attributes:
        mask: bool ``[..., N]``, the kept positions, exactly ``min(k, valid)`` per row (unless ``exact_budget`` is False).
        gates: fp32 ``[..., N]`` or None; equal to ``mask`` in the forward (a relaxation may differ), gradient to the scores.
        log_prob: fp32 ``[...]`` or None; log-probability of ``mask`` (or of the order drawn) under the sampling law.
        entropy: fp32 ``[...]`` or None; of the sampling law, in nats.
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
        uniform: draws fp32 noise in (0, 1) of a shape, on the device of the scores.
        temperature: > 0; divides the scores of the sampling law or of a relaxation that the forward sees.
        backward_temperature: > 0, a number or fp32 ``[..., 1]``; of the surrogate that only the gradient sees. None: ``temperature``.
        exploration: in [0, 1]; probability that a row keeps positions drawn uniformly.
        posterior: fp32 ``[..., N]`` scores of the inference network, for estimators that need ``target``.
        class_loss: for estimators that need ``class``: weights fp32 ``[..., N]`` of the candidates to the loss fp32 ``[...]`` of an
            auxiliary head that reads the candidates by them.
    """

    uniform: Callable[[tuple[int, ...]], Tensor]
    temperature: float = 1.0
    backward_temperature: float | Tensor | None = None
    exploration: float = 0.0
    posterior: Tensor | None = None
    class_loss: Callable[[Tensor], Tensor] | None = None

    @property
    def backward(self) -> float | Tensor:
        """The temperature of the gradient's surrogate."""
        return self.temperature if self.backward_temperature is None else self.backward_temperature

    def explores(self, rows: Tensor) -> Tensor | None:
        """Which rows explore, bool of the shape of ``rows``; None when none can."""
        return self.uniform(tuple(rows.shape)) < self.exploration if self.exploration > 0 else None


class Estimator(Configurable, nn.Module):
    """An estimator. Subclasses declare the facts below, keyword options in ``__init__``, and ``sample``.

    Class attributes:
        biased: whether the expected gradient differs from the exact one.
        needs: keys of ``NEEDS``.
        trains_gathered: whether training computes on the kept positions only, with the saving; follows from ``needs``.
        exact_budget: whether a training choice keeps exactly the budget (evaluation always does).
        detaches: whether the scorer's input is detached, so that the selector's loss leaves the backbone alone.
        source: paper and equation.
        caution: option (``"name=value"``), or ``"default"`` for the estimator as it stands, to what is known to go wrong with it; shown
            by ``hf-hardattn list``.
        former_defaults: schema version of a saved configuration to the options that had another default in it and in those
            before; applied by ``saved_options``.
    """

    kind = "estimator"
    biased: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]] = ()
    trains_gathered: ClassVar[bool]
    exact_budget: ClassVar[bool] = True
    detaches: ClassVar[bool] = False
    source: ClassVar[str]
    caution: ClassVar[Mapping[str, str]] = {}
    former_defaults: ClassVar[Mapping[int, Mapping[str, Any]]] = {}

    def __init_subclass__(cls) -> None:
        cls.trains_gathered = "gates" not in cls.needs

    @classmethod
    def saved_options(cls, options: Mapping[str, Any], schema_version: int) -> dict[str, Any]:
        """Complete the options of a saved configuration by the defaults of its time, so that it keeps its meaning.

        A configuration is saved with the options that were named, not with the defaults of the others. Call this once, on a
        configuration that was read; one that a user writes takes today's defaults.

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
        """Sampled forward passes a training step."""
        return 1

    def advantage(self, reward: Tensor, others: Tensor) -> Tensor:
        """Return the weight of a sample's log-probability gradient: its reward minus the mean of the other samples'.

        Args:
            reward: fp32 ``[B]``, of the sample; higher = better.
            others: fp32 ``[M, B]``, of the same example's other samples.

        Returns:
            fp32 ``[B]``.
        """
        return reward - others.sum(0) / max(len(others), 1)

    def reset_parameters(self) -> None:
        """Initialise the parameters, where an estimator has any."""

    def choose(
        self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling | None = None
    ) -> Choice:
        """Choose ``k`` of the valid positions of each row.

        A row that holds no choice (``k`` is 0, nothing is valid, or everything valid is kept) keeps nothing or everything
        valid; its scores get a gradient of exactly zero, not none at all.

        Args:
            scores: fp32 ``[..., N]``, finite, N >= 1; higher = keep.
            k: int64 ``[...]``, positions to keep; rows with fewer valid ones keep them all.
            valid: bool ``[..., N]``; False positions are never kept.
            slots: >= 0, static upper bound of what a row keeps; a larger ``k`` counts as ``slots``.
            sampling: how to draw in training; None takes the deterministic top-k, whatever the estimator.

        Returns:
            The choice, with exactly ``min(k, valid, slots)`` positions a row (unless ``exact_budget`` is False).
        """
        # Rows whose own count exceeds the bound exist where a relaxation upstream left more rows than its budget. A bound of
        # 0 is that of a row with nothing but its protected position; estimators see at least one slot, with k = 0.
        k, slots = k.clamp(max=slots), max(1, min(slots, scores.shape[-1]))
        if sampling is None:
            return Choice(topk_mask(scores, k, valid, slots))
        choice = self.sample(scores, k, valid, slots=slots, sampling=sampling)
        explores = None if choice.gates is None else sampling.explores(k.expand(scores.shape[:-1]))
        if explores is not None and choice.gates is not None:
            mask = topk_mask(sampling.uniform(tuple(scores.shape)), k, valid, slots)
            choice.mask = choice.mask.where(~explores.unsqueeze(-1), mask)
            # the values of the new choice, the gradient of the old: what exploration finds, the surrogate learns from
            gates = choice.mask + (choice.gates - choice.gates.detach())
            choice.gates = choice.gates.where(~explores.unsqueeze(-1), gates)
        return choice

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose in training; same arguments as ``choose``. Exploration is added to gates by ``choose``; estimators with
        log-probabilities sample it themselves."""
        raise NotImplementedError
