"""A selector: scorer, budget and estimator of one site, as a module."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import registry
from .budget import Budget
from .config import SiteConfig
from .errors import HardAttentionError
from .estimators import Sampling
from .glimpses import look, read_on
from .noise import uniform
from .posterior import Posterior
from .schedules import Schedule
from .scorers import Projections, Sequential
from .selection import Selection


@dataclass
class Context:
    """What else a training choice reads of the candidates.

    Attributes:
        summary: fp32 ``[B, D]`` or None; mean state, detached, for a learned baseline.
        keys: fp32 ``[B, N, d]`` or None; of the inference network.
    """

    summary: Tensor | None = None
    keys: Tensor | None = None


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
        target_size: D of the target's states, for estimators that need the target.

    Attributes:
        enabled: False makes the host run soft (set by ``soft``).
        replayed: most positions that the choices given from outside keep (set by ``replay``); None while it chooses.
        step, steps: optimizer step, and how many the training has, for the schedules (set by ``set_step``).
        target: states of the labels ``[B, T, D]`` in training, for estimators that need them (set by the model's hook).
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
        target_size: int = 0,
    ):
        super().__init__()
        self.site, self.config, self.always, self.causal = site, config, always, causal
        self.heads = heads if config.per_head else 1
        self.scorer = registry.load("scorers", config.scorer)(
            hidden_size=hidden_size, query_size=query_size, heads=self.heads, **config.scorer_options
        )
        self.estimator = registry.load("estimators", config.estimator)(**config.estimator_options)
        self.baseline = None
        if (
            "reward" in self.estimator.needs and self.estimator.samples == 1
        ):  # several samples are each other's baseline
            self.baseline = registry.load("baselines", config.baseline)(**config.baseline_options)
            self.baseline.build(hidden_size)
        self.posterior = None
        if "target" in self.estimator.needs and self.learned:
            self.posterior = Posterior(hidden_size, target_size or hidden_size)
        self.temperature = Schedule.parse(config.temperature, site)
        adaptive = config.backward_temperature in (None, "adaptive")
        self.backward_temperature = None if adaptive else Schedule.parse(config.backward_temperature, site)
        self.exploration = Schedule.parse(config.exploration, site)
        self.soft_rate = Schedule.parse(config.soft_rate, site)
        self.entropy_weight = Schedule.parse(config.entropy_weight, site)
        self.budget_schedule = Schedule.parse(config.budget, site) if isinstance(config.budget, dict) else None
        self.enabled = True
        self.replayed: int | None = None
        self.step: int | None = None
        self.steps: int | None = None
        self.target: Tensor | None = None

    def reset_parameters(self) -> None:
        """Initialise afresh; called by Transformers for weights that no checkpoint holds."""
        for part in (self.scorer, self.estimator, self.baseline, self.posterior):
            if part is not None:
                part.reset_parameters()

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
            float(self.now(self.budget_schedule) if self.training else self.budget_schedule.end), self.site
        )

    def survivors(self, n: int) -> int:
        """Bound of the rows of a residual stream that are there after this site, of ``n`` before, the row kept always among them; in
        training that of a schedule's loosest budget, so that shapes stay the same."""
        if not self.enabled or self.config.estimator == "soft" or self.loose:
            return n
        if self.replayed is not None:
            return min(n, self.replayed)
        schedule, budget = self.budget_schedule, self.budget
        if schedule is not None and self.training:
            budget = Budget.parse(float(max(schedule.start, schedule.end)), self.site)
        return min(n, budget.slots(n - 1) + 1)

    @property
    def data_dependent(self) -> bool:
        """Whether only the scores tell how many positions are kept."""
        return (self.budget.data_dependent or self.halts) and self.config.estimator != "soft"

    @property
    def halts(self) -> bool:
        """Whether a scorer that looks several times may stop before the budget is spent."""
        return isinstance(self.scorer, Sequential) and self.scorer.halts and not self.keeps_all

    @property
    def loose(self) -> bool:
        """Whether this forward may keep more than the budget: an estimator with gates of its own count, or soft rows."""
        return self.training and (not self.estimator.exact_budget or bool(self.config.soft_rate))

    @property
    def keeps_all(self) -> bool:
        """Whether nothing can be dropped here, whatever the scores: then no cache needs to hold them."""
        return self.config.estimator == "soft" or (isinstance(self.config.budget, float) and self.config.budget == 1.0)

    @property
    def masked(self) -> bool:
        """Whether this forward runs masked (training needs it for pathwise estimators) rather than gathered."""
        if self.config.execution == "auto":
            return self.training and not self.estimator.trains_gathered and self.learned
        return self.config.execution == "masked"

    def now(self, schedule: Schedule) -> float:
        """The value of a schedule at the current step."""
        if self.step is None and not schedule.constant:
            warnings.warn(
                f"'{self.site}' has a schedule that stands at step 0; add HardAttentionCallback() to the Trainer, "
                "or call hf_hardattn.set_step(model, step) after each optimizer step.",
                stacklevel=2,
            )
            self.step = 0
        if schedule.relative and not self.steps:
            raise HardAttentionError(
                f"steps={schedule.steps} of a schedule at '{self.site}' is a share of the training, whose length is not known. Call "
                "hf_hardattn.set_step(model, step, total_steps), add HardAttentionCallback() to the Trainer, or count steps with an int."
            )
        return schedule(self.step or 0, self.steps or 0)

    def _sampling(self, scores: Tensor, candidates: Tensor, context: Context | None) -> Sampling:
        """How this training choice is drawn; ``scores`` and ``candidates`` are ``[B, H, Q, N]``."""
        temperature = self.now(self.temperature)
        backward: float | Tensor | None = None
        if self.backward_temperature is not None:
            backward = self.now(self.backward_temperature)
        elif self.config.backward_temperature == "adaptive":
            count = candidates.sum(-1, keepdim=True).clamp(min=1)
            known = scores.detach().masked_fill(~candidates, 0.0)
            spread = (
                known.square().sum(-1, keepdim=True) / count - (known.sum(-1, keepdim=True) / count).square()
            ).clamp(min=0)
            backward = spread.sqrt().clamp(min=temperature)
        posterior = None
        if self.posterior is not None and self.target is not None and context is not None and context.keys is not None:
            posterior = scores.detach() + self.posterior(context.keys, self.target, scores.shape[2])
        return Sampling(
            uniform=lambda size: uniform(size, scores.device, max(0, len(size) - scores.dim())),
            temperature=temperature,
            backward_temperature=backward,
            exploration=self.now(self.exploration),
            posterior=posterior,
        )

    def context(self, states: Tensor, valid: Tensor | None = None) -> Context | None:
        """What else a training choice reads of the candidates; None when it reads nothing.

        Args:
            states: ``[B, N, D]``. valid: bool ``[B, N]`` or None (all).
        """
        summarised = self.baseline is not None and self.baseline.needs_summary
        if not self.training or not (summarised or self.posterior is not None):
            return None
        context = Context()
        if summarised:
            known = states.detach().float()
            if valid is None:
                context.summary = known.mean(1)
            else:
                context.summary = (known * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        if self.posterior is not None:
            context.keys = self.posterior.keys(states)
        return context

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
        if self.estimator.detaches:
            states = states.detach()
        seen = isinstance(past, Tensor) or past > 0
        return self.scorer.keys(states, positions + past if seen else positions, projections)

    def forward(
        self,
        features: Tensor,
        valid: Tensor | None,
        required: Tensor | None = None,
        queries: Tensor | None = None,
        forced: Tensor | None = None,
        most: int | None = None,
        context: Context | None = None,
    ) -> Selection:
        """Choose.

        Args:
            features: ``[B, H, N, F]`` from ``keys``.
            valid: bool, broadcastable to ``[B, H, Q, N]``; None when every position is valid.
            required: bool ``[B, 1, 1, N]`` or None: kept always, at most one per row, not a choice.
            queries: ``[B, Q, D]`` for scorers with ``per_query``.
            forced: bool ``[B, H, Q, N]``: keep this instead (replay); the scores are still computed.
            most: bound of the valid candidates of a row; N by default.
            context: from ``context``.

        Returns:
            The selection; ``mask`` holds exactly ``min(k, valid)`` chosen positions per row, plus the required ones.
        """
        if queries is not None and self.estimator.detaches:
            queries = queries.detach()
        scores = self.scorer.score(features, queries)
        n = scores.shape[-1]
        everything = valid is None
        dense = everything and not self.data_dependent
        valid = torch.ones((1, 1, 1, n), dtype=torch.bool, device=scores.device) if valid is None else valid
        # torch.broadcast_shapes would take longer than the choice
        shape = tuple(size if other == 1 else other for size, other in zip(scores.shape, valid.shape, strict=True))
        scores, valid = scores.expand(shape), valid.expand(shape)
        candidates, always = valid, None
        if required is not None:
            candidates = (~required).expand(shape) if everything else valid & ~required
            always = required if everything else valid & required
        if forced is not None:
            mask = forced.expand(shape) & valid
            mask = mask if always is None else mask | always
            slots, full, lengths = self._asked(mask)
            return Selection(
                self.site,
                mask,
                valid,
                always,
                scores,
                slots=slots,
                dense=full,
                masked=self.masked,
                lengths=lengths,
            )
        budget = self.budget
        extra = 0 if required is None else 1
        if dense:  # as many candidates in every row, so nothing is counted
            k = torch.full(shape[:-1], budget.slots(n - extra), device=scores.device)
        else:
            k = budget.count(scores.detach(), candidates)
        most = n if most is None else most
        slots = budget.slots(most - extra)
        sampling = self._sampling(scores, candidates, context) if self.training else None
        if isinstance(self.scorer, Sequential):
            choice, scores = look(
                self.scorer,
                self.estimator,
                features.expand(shape[0], -1, -1, -1),
                k.expand(shape[:-1]),
                candidates,
                slots=slots,
                sampling=sampling,
                halts=self.halts,
            )
        elif self.scorer.monotonic:
            passed = (features[..., -1] > 0.5).expand(shape[0], -1, -1)
            k = k.expand(shape[:-1])
            choice = read_on(self.estimator, scores, k, candidates, passed, slots=slots, sampling=sampling)
        else:
            choice = self.estimator.choose(scores, k, candidates, slots=slots, sampling=sampling)
        # only masked training has a use for gates: elsewhere nothing is left of what they would weigh
        mask, gates, penalty = choice.mask, choice.gates if self.training and self.masked else None, choice.penalty
        if sampling is not None and gates is not None and self.config.soft_rate:
            soft = sampling.uniform((shape[0], 1, 1, 1)) < self.now(self.soft_rate)
            mask = torch.where(soft, candidates, mask)
            gates = torch.where(soft, candidates + (gates - gates.detach()), gates)
        if gates is not None and self.posterior is not None and sampling is not None and sampling.posterior is None:
            # no target: a gradient of zero rather than none, since distributed training waits for every parameter
            gates = gates + 0.0 * torch.stack([p.float().sum() for p in self.posterior.parameters()]).sum()
        if always is not None:
            mask = mask | always
            gates = None if gates is None else gates.masked_fill(always, 1.0)
        if penalty is not None and self.target is not None and penalty.shape[-1] == self.target.shape[1] > 1:
            present = (self.target != 0).any(-1)[:, None]  # a padding query has no target to explain
            penalty = penalty * present * (present.numel() / present.sum().clamp(min=1))
        # of monotonic choices the last find less left than the budget
        full, lengths = dense and not self.loose and not self.scorer.monotonic, None
        if self.config.estimator == "soft" or self.loose:
            slots = most - extra
        elif (self.data_dependent or self.config.pack) and not (self.training and self.masked):
            (slots, full, lengths), extra = self._asked(mask), 0
        return Selection(
            self.site,
            mask,
            valid,
            always,
            scores,
            gates,
            choice.log_prob,
            choice.entropy,
            penalty,
            None if context is None else context.summary,
            slots=slots + extra,
            dense=full,
            masked=self.masked,
            lengths=lengths,
        )

    def _asked(self, mask: Tensor) -> tuple[int, bool, tuple[int, ...] | None]:
        """Slots that a choice needs, whether every row fills them, and how many positions each row keeps where rows are packed: the one
        place that waits for the device. A replayed choice is packed where the choice itself would be, or last bits would differ."""
        kept = mask.sum(-1)
        most, least = (int(number) for number in torch.stack((kept.max(), kept.min())).tolist())
        slots = max(1, most)
        wanted = self.data_dependent if self.config.pack is None else self.config.pack
        packs = wanted and not self.masked and kept.shape[1:].numel() == 1 and least < most
        return slots, least == slots, tuple(kept.flatten().tolist()) if packs else None
