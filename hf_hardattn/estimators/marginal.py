"""Marginal: every choice is tried, and weighed by its probability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from torch import Tensor

from ..distributions import ConditionalBernoulli
from ..errors import HardAttentionError
from ..functional.topk import topk_mask
from ..options import Range
from . import Choice, Estimator, Sampling


class Marginal(Estimator):
    """Run the model once for each of the C(N, k) choices S, ``p(S) ~ exp(sum of scores)``, and train on all of them:

    * ``likelihood``: ``- log sum_S p(S) p(y | S)``, the exact marginal likelihood of the latent choice; where queries choose
      for themselves (the last layer's ``cross`` or ``self``, k = 1), label by label.
    * ``expectation``: ``sum_S p(S) loss(S)``, what REINFORCE samples.

    Exact: nothing is drawn, there is no variance. For k = 1, and for small N as a reference. Only one site of a model may
    use it. The logits returned are those of the deterministic choice; the loss replaces the model's.

    Args:
        objective: ``likelihood`` or ``expectation``.
        limit: most choices tried in a step, in [1, 65536].
        monotonic: of ``likelihood`` where queries choose for themselves: sum over the alignments that never go back instead, each query
            choosing from where the one before read, by the forward algorithm. Its scorer should be monotonic too.

    Gradient and cost: C(N, k) + 1 forward passes and as much memory.

    Raises:
        HardAttentionError: unknown objective; limit out of range; monotonic with another objective than likelihood.

    Source: Deng et al. 2018, "Latent Alignment and Variational Attention", arXiv:1807.03756, equation 3; monotonic: Wu & Cotterell
    2019, "Exact Hard Monotonic Attention for Character-Level Transduction", arXiv:1905.06319, section 3.
    """

    biased = False
    needs = ("choices",)
    source = "Deng et al. 2018, arXiv:1807.03756, equation 3"

    def __init__(
        self,
        objective: Literal["likelihood", "expectation"] = "likelihood",
        limit: Annotated[int, Range(1, 65_536, "It counts choices, >= 1.")] = 256,
        monotonic: bool = False,
    ) -> None:
        super().__init__()
        self.objective, self.limit, self.monotonic = objective, limit, monotonic

    @classmethod
    def check_together(cls, options: Mapping[str, Any], where: str) -> None:
        if options.get("monotonic") and options.get("objective", "likelihood") != "likelihood":
            raise HardAttentionError(
                f"monotonic=True with objective={options['objective']!r} at {where}; alignments are summed over in the likelihood. "
                "Use objective='likelihood'."
            )

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Take the top k: the choice behind the logits. The model's hook tries the others."""
        entropy = ConditionalBernoulli(scores / sampling.temperature, k, valid, slots).entropy()
        return Choice(topk_mask(scores, k, valid, slots), entropy=entropy)
