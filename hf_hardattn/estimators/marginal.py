"""Marginal: every choice is tried and weighted by its probability."""

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

    * ``likelihood``: ``- log sum_S p(S) p(y | S)``, the exact marginal likelihood of the latent choice; if each query has its own
      choice (the last layer's ``cross`` or ``self``, k = 1), it is computed label by label.
    * ``expectation``: ``sum_S p(S) loss(S)``, which REINFORCE estimates by sampling.

    The gradient is exact: nothing is drawn, so there is no variance. Use it for k = 1, and for small N as a reference. Only one
    site of a model may use it. The returned logits are those of the deterministic choice; the loss replaces that of the model.

    Args:
        objective: ``likelihood`` or ``expectation``.
        limit: largest number of choices tried in a step, in [1, 65536].
        monotonic: for ``likelihood`` with a choice per query: sum only over the alignments that never go back, in which each query
            chooses from the position of the previous query onwards, by the forward algorithm. The scorer should be monotonic too.

    Gradient and cost: C(N, k) + 1 forward passes, and memory in proportion.

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
        limit: Annotated[int, Range(1, 65_536, "It is a number of selections, >= 1.")] = 256,
        monotonic: bool = False,
    ) -> None:
        super().__init__()
        self.objective, self.limit, self.monotonic = objective, limit, monotonic

    @classmethod
    def check_together(cls, options: Mapping[str, Any], where: str) -> None:
        if options.get("monotonic") and options.get("objective", "likelihood") != "likelihood":
            raise HardAttentionError(
                f"monotonic=True with objective={options['objective']!r} at {where}; the sum over alignments is a likelihood. "
                "Use objective='likelihood'."
            )

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k, from which the logits are computed. The training loss tries the other choices."""
        entropy = ConditionalBernoulli(scores / sampling.temperature, k, valid, slots).entropy()
        return Choice(topk_mask(scores, k, valid, slots), entropy=entropy)
