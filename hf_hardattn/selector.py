"""A selector: scorer, budget and estimator of one site, as a module."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from . import registry
from .budget import Budget
from .config import SiteConfig
from .noise import uniform
from .schedules import Schedule
from .scorers import Projections
from .selection import Selection


class Selector(nn.Module):
    """Makes the choice of one site. ``record`` and ``replay`` hook its ``forward``.

    Args:
        site: name, ``tower.kind.layer``.
        config: the site's configuration.
        hidden_size: D of the candidates.
        query_size: D of the queries (for scorers with ``per_query``).
        heads: H of the host attention; used when ``config.per_head``.
        always: which candidate is kept always: ``"first"`` (CLS), ``"last"`` valid one (``</s>``) or None.
        causal: a query chooses among its past only.

    Attributes:
        enabled: False makes the host run soft (set by ``soft``).
        replayed: most positions that the choices given from outside keep (set by ``replay``); None while it chooses.
        step: optimizer step, for the schedules (set by ``set_step`` and ``HardAttentionCallback``).
    """

    def __init__(
        self,
        site: str,
        config: SiteConfig,
        *,
        hidden_size: int,
        query_size: int,
        heads: int,
        always: str | None = None,
        causal: bool = False,
    ):
        super().__init__()
        self.site, self.config, self.always, self.causal = site, config, always, causal
        self.heads = heads if config.per_head else 1
        self.scorer = registry.load("scorers", config.scorer)(
            hidden_size=hidden_size, query_size=query_size, heads=self.heads, **config.scorer_options
        )
        self.estimator = registry.load("estimators", config.estimator)(**config.estimator_options)
        self.baseline = None
        if not self.estimator.pathwise:
            self.baseline = registry.load("baselines", config.baseline)(**config.baseline_options)
        self.temperature = Schedule.parse(config.temperature, site)
        self.entropy_weight = Schedule.parse(config.entropy_weight, site)
        self.budget_schedule = Schedule.parse(config.budget, site) if isinstance(config.budget, dict) else None
        self.enabled = True
        self.replayed: int | None = None
        self.step: int | None = None

    def reset_parameters(self) -> None:
        """Initialise afresh; called by Transformers for weights that no checkpoint holds."""
        self.scorer.reset_parameters()

    def extra_repr(self) -> str:
        return f"'{self.site}', scorer={self.config.scorer}, budget={self.config.budget}, estimator={self.config.estimator}"

    @property
    def once(self) -> bool:
        """Whether one choice serves all queries of a row."""
        return not self.causal and not self.scorer.per_query

    @property
    def learned(self) -> bool:
        """Whether there is anything to learn; a control without parameters can train gathered under any estimator."""
        return next(self.scorer.parameters(), None) is not None

    @property
    def budget(self) -> Budget:
        """The budget in force: of the current step in training, the schedule's end in evaluation."""
        if self.budget_schedule is None:
            return Budget.parse(self.config.budget, self.site)
        return Budget.parse(
            float(self._now(self.budget_schedule) if self.training else self.budget_schedule.end), self.site
        )

    def survivors(self, n: int) -> int:
        """Bound of the rows of a residual stream that are there after this site, of ``n`` before: the loosest budget, and the row kept always."""
        if not self.enabled or self.config.estimator == "soft":
            return n
        if self.replayed is not None:
            return min(n, self.replayed)
        schedule = self.budget_schedule
        budget = self.budget if schedule is None else Budget.parse(float(max(schedule.start, schedule.end)), self.site)
        return min(n, budget.slots(n - 1) + 1)

    @property
    def data_dependent(self) -> bool:
        """Whether only the scores tell how many positions are kept."""
        return self.budget.data_dependent and self.config.estimator != "soft"

    @property
    def keeps_all(self) -> bool:
        """Whether nothing can be dropped here, whatever the scores: then no cache needs to hold them."""
        return self.config.estimator == "soft" or (isinstance(self.config.budget, float) and self.config.budget == 1.0)

    @property
    def masked(self) -> bool:
        """Whether this forward runs masked (training needs it for pathwise estimators) rather than gathered."""
        if self.config.execution == "auto":
            return self.training and self.estimator.pathwise and self.learned
        return self.config.execution == "masked"

    def _now(self, schedule: Schedule) -> float:
        if self.step is None and not schedule.constant:
            warnings.warn(
                f"'{self.site}' has a schedule that stands at step 0; add HardAttentionCallback() to the Trainer, "
                "or call hf_hardattn.set_step(model, step) after each optimizer step.",
                stacklevel=2,
            )
            self.step = 0
        return schedule(self.step or 0)

    def keys(
        self,
        states: Tensor,
        valid: Tensor | None = None,
        past: int | Tensor = 0,
        projections: Projections | None = None,
    ) -> Tensor:
        """Features of each position alone, fp32 ``[B, H, N, F]``, for ``forward`` and for caching beside the attention's keys.

        Args:
            states: ``[B, N, D]``.
            valid: bool ``[B, N]`` or None (all): padding does not count as a place.
            past: positions already cached.
            projections: the host attention's.
        """
        if valid is None:
            positions = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
        else:
            positions = (valid.cumsum(-1) - 1).clamp(min=0)
        return self.scorer.keys(states, positions + past, projections)

    def forward(
        self,
        features: Tensor,
        valid: Tensor | None,
        required: Tensor | None = None,
        queries: Tensor | None = None,
        forced: Tensor | None = None,
        most: int | None = None,
    ) -> Selection:
        """Choose.

        Args:
            features: ``[B, H, N, F]`` from ``keys``.
            valid: bool, broadcastable to ``[B, H, Q, N]``; None when every position is valid.
            required: bool ``[B, 1, 1, N]`` or None: kept always, at most one per row, not a choice.
            queries: ``[B, Q, D]`` for scorers with ``per_query``.
            forced: bool ``[B, H, Q, N]``: keep this instead (replay); the scores are still computed.
            most: bound of the valid candidates of a row; N by default.

        Returns:
            The selection; ``mask`` holds exactly ``min(k, valid)`` chosen positions per row, plus the required ones.
        """
        scores = self.scorer.score(features, queries)
        n = scores.shape[-1]
        dense = valid is None and not self.data_dependent
        valid = torch.ones((1, 1, 1, n), dtype=torch.bool, device=scores.device) if valid is None else valid
        shape = torch.broadcast_shapes(scores.shape, valid.shape)
        scores, valid = scores.expand(shape), valid.expand(shape)
        candidates = valid if required is None else valid & ~required
        always = None if required is None else valid & required
        if forced is not None:
            mask = forced.expand(shape) & valid
            slots = max(1, int(mask.sum(-1).max()))
            return Selection(
                self.site, mask, valid, always, scores, slots=slots, dense=bool((mask.sum(-1) == slots).all())
            )
        budget = self.budget
        extra = 0 if required is None else 1
        k = budget.count(scores.detach(), candidates)
        most = n if most is None else most
        slots = budget.slots(most - extra)
        choice = self.estimator.choose(
            scores,
            k,
            candidates,
            slots=slots,
            training=self.training,
            temperature=self._now(self.temperature) if self.training else 1.0,
            uniform=lambda size: uniform(size, scores.device),
        )
        mask, gates = choice.mask, choice.gates if self.training else None  # evaluation has nothing to differentiate
        if always is not None:
            mask = mask | always
            gates = None if gates is None else gates.masked_fill(always, 1.0)
        if self.config.estimator == "soft":
            slots = most - extra
        elif self.data_dependent and not (self.training and self.masked):
            slots, extra = max(1, int(mask.sum(-1).max())), 0  # the one place that waits for the device
        return Selection(
            self.site, mask, valid, always, scores, gates, choice.log_prob, choice.entropy, slots + extra, dense
        )
