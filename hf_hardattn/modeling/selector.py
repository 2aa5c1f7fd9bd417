"""A selector: scorer, budget and estimator of one site, as a module."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import registry
from ..budget import Budget
from ..config import SiteConfig
from ..distributions.noise import uniform
from ..errors import HardAttentionError
from ..estimators import Choice, Sampling
from ..schedules import Schedule
from ..scorers import Projections, Sequential
from .context import ForwardContext, Settings
from .glimpses import look, read_on
from .posterior import Posterior
from .selection import Selection


class Protected(NamedTuple):
    """Rows that are always kept and are no choice.

    Attributes:
        first: how many rows at the start (CLS, registers).
        last: whether the last valid row (``</s>``).
    """

    first: int = 0
    last: bool = False

    @property
    def rows(self) -> int:
        """How many rows of a row of candidates are protected."""
        return self.first + int(self.last)

    def mask(self, shape: tuple[int, int], valid: Tensor | None, device: torch.device) -> Tensor | None:
        """Which rows are protected, bool ``[B, N]``; None when none is."""
        if not self.rows:
            return None
        place = torch.arange(shape[1], device=device).expand(shape)
        protected = place < self.first
        if not self.last:
            return protected
        last: Any = shape[1] - 1 if valid is None else torch.where(valid, place, -1).amax(-1, keepdim=True)
        return protected | (place == last) if self.first else place == last


@dataclass
class Candidates:
    """What a choice is made among.

    Attributes:
        valid: bool, broadcastable to ``[B, H, Q, N]``; None when every position is valid.
        protected: bool ``[B, 1, 1, N]``, see ``Protected``; None when nothing is, or when ``ends`` says it.
        ends: the protected rows, where they are the same in every row of the batch.
        bound: how many valid candidates a row has at most.
    """

    valid: Tensor | None = None
    protected: Tensor | None = None
    ends: Protected = Protected()
    bound: int | None = None


@dataclass
class TrainingInputs:
    """What else a training choice reads of the candidates.

    Attributes:
        summary: fp32 ``[B, D]`` or None; mean state, detached, for a learned baseline.
        keys: fp32 ``[B, N, d]`` or None; for an inference network.
        target: states of the labels ``[B, T, D]`` or None; for an inference network.
    """

    summary: Tensor | None = None
    keys: Tensor | None = None
    target: Tensor | None = None


class Selector(nn.Module):
    """Makes the choice of one site.

    Args:
        site: name, ``tower.kind.layer``.
        config: the site's configuration.
        hidden_size: D of the candidates.
        query_size: D of the queries (for scorers with ``per_query``).
        heads: H of the host attention; used when ``config.per_head``.
        protected: rows that are always kept.
        causal: a query chooses among its past only.
        target_size: D of the target's states, for estimators that need the target.

    Attributes:
        step, steps: optimizer step, and how many the training has, for the schedules (set by ``set_step``).
    """

    def __init__(
        self,
        site: str,
        config: SiteConfig,
        *,
        hidden_size: int,
        query_size: int,
        heads: int,
        protected: Protected | None = None,
        causal: bool = False,
        target_size: int = 0,
    ):
        super().__init__()
        self.site, self.config, self.causal = site, config, causal
        self.protected = protected or Protected()
        self.heads = heads if config.per_head else 1
        # what the weights were made for: a selector is reused only where this is the same
        self.sizes = (hidden_size, query_size, self.heads, target_size)
        self.scorer = registry.load("scorers", config.scorer)(
            hidden_size=hidden_size, query_size=query_size, heads=self.heads, **config.scorer_options
        )
        self.estimator = registry.load("estimators", config.estimator)(**config.estimator_options)
        self.baseline = None
        # several samples are each other's baseline
        if "reward" in self.estimator.needs and self.estimator.samples == 1:
            self.baseline = registry.load("baselines", config.baseline)(**config.baseline_options)
            self.baseline.build(hidden_size)
        self.posterior = None
        if "target" in self.estimator.needs and self.learned:
            self.posterior = Posterior(hidden_size, target_size or hidden_size)
        self.step: int | None = None
        self.steps: int | None = None
        self._read_schedules()

    def _read_schedules(self) -> None:
        config, site = self.config, self.site
        self.temperature = Schedule.parse(config.temperature, site)
        adaptive = config.backward_temperature in (None, "adaptive")
        self.backward_temperature = None if adaptive else Schedule.parse(config.backward_temperature, site)
        self.exploration = Schedule.parse(config.exploration, site)
        self.soft_rate = Schedule.parse(config.soft_rate, site)
        self.entropy_weight = Schedule.parse(config.entropy_weight, site)
        self.budget_schedule = Schedule.parse(config.budget, site) if isinstance(config.budget, dict) else None

    def set_config(self, config: SiteConfig) -> None:
        """Take another configuration of the same scorer, estimator and baseline."""
        self.config = config
        self._read_schedules()

    def reset_parameters(self) -> None:
        """Initialise afresh; called by Transformers for weights that no checkpoint holds."""
        for part in (self.scorer, self.estimator, self.baseline, self.posterior):
            if part is not None:
                part.reset_parameters()

    def extra_repr(self) -> str:
        config = self.config
        return f"'{self.site}', scorer={config.scorer}, budget={config.budget}, estimator={config.estimator}"

    # ---------------------------------------------------------------- facts of the configuration

    @property
    def once(self) -> bool:
        """Whether one choice serves all queries of a row."""
        return not self.causal and not self.scorer.per_query

    @property
    def learned(self) -> bool:
        """Whether there is anything to learn; a control without parameters can train gathered under any estimator."""
        return next(self.scorer.parameters(), None) is not None

    @property
    def adds_terms(self) -> bool:
        """Whether a training choice may add a term to the loss: a reward's, a penalty, an entropy bonus, a teacher's."""
        estimator = self.estimator
        reads_loss = bool({"reward", "choices", "teacher", "target"} & set(estimator.needs))
        entropy = not self.entropy_weight.constant or self.entropy_weight.end != 0
        return reads_loss or not estimator.exact_budget or entropy or self.halts

    @property
    def keeps_all(self) -> bool:
        """Whether nothing can be dropped here, whatever the scores."""
        return self.config.estimator == "soft" or (isinstance(self.config.budget, float) and self.config.budget == 1.0)

    @property
    def data_dependent(self) -> bool:
        """Whether only the scores tell how many positions are kept."""
        return (self.budget(drawing=False).data_dependent or self.halts) and self.config.estimator != "soft"

    @property
    def halts(self) -> bool:
        """Whether a scorer of several glimpses may stop before the budget is spent."""
        return isinstance(self.scorer, Sequential) and self.scorer.halts and not self.keeps_all

    @property
    def masked(self) -> bool:
        """Whether a forward in the module's present mode runs masked rather than gathered."""
        return self.runs_masked(Settings(drawing=self.training))

    def runs_masked(self, settings: Settings) -> bool:
        """Whether the choice weighs all candidates (pathwise estimators need it to train) instead of dropping some."""
        execution = settings.execution or self.config.execution
        if execution == "auto":
            return settings.drawing and not self.estimator.trains_gathered and self.learned
        return execution == "masked"

    def loose(self, settings: Settings) -> bool:
        """Whether this choice may keep more than the budget: an estimator with gates of its own count, or soft rows."""
        return settings.drawing and (not self.estimator.exact_budget or bool(self.config.soft_rate))

    def budget(self, *, drawing: bool, final: bool = False) -> Budget:
        """The budget in force: of the current step in training, the schedule's end in evaluation."""
        schedule = self.budget_schedule
        if schedule is None:
            return Budget.parse(self.config.budget, self.site)
        return Budget.parse(float(self.now(schedule, final) if drawing else schedule.end), self.site)

    def now(self, schedule: Schedule, final: bool = False) -> float:
        """The value of a schedule at the current step, or at its end."""
        if schedule.constant or final:
            return schedule.end
        if self.step is None:
            # nobody counts steps: a model that is not being trained stands at the end of its schedules
            if not self.training:
                return schedule.end
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

    # ---------------------------------------------------------------- scores

    def keys(
        self,
        states: Tensor,
        settings: Settings,
        valid: Tensor | None = None,
        past: int | Tensor = 0,
        projections: Projections | None = None,
    ) -> Tensor:
        """Features of each position alone, fp32 ``[B, H, N, F]``, for ``forward`` and for caching beside the attention's keys.

        Args:
            states: ``[B, N, D]``.
            settings: of this call.
            valid: bool ``[B, N]`` or None (all): padding does not count as a place.
            past: positions already cached.
            projections: the host attention's.
        """
        if settings.drawing and self.scorer.draws:
            return self.scorer("draw", states)
        positions = _places(states, valid, past) if self.scorer.needs_positions else None
        if self.estimator.detaches:
            states = states.detach()
        if projections is not None:
            projections = replace(projections, valid=valid)
        with full_precision(states.device):
            return self.scorer("keys", states, positions, projections)

    def training_inputs(
        self, states: Tensor, valid: Tensor | None, context: ForwardContext, settings: Settings
    ) -> TrainingInputs | None:
        """What else a training choice reads of the candidates ``[B, N, D]``; None when it reads nothing."""
        summarised = self.baseline is not None and self.baseline.needs_summary
        if not settings.drawing or not (summarised or self.posterior is not None):
            return None
        inputs = TrainingInputs()
        if summarised:
            known = states.detach().float()
            if valid is None:
                inputs.summary = known.mean(1)
            else:
                inputs.summary = (known * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        if self.posterior is not None:
            inputs.target = None if settings.final else context.target
            with full_precision(states.device):
                inputs.keys = self.posterior.keys(states)
        return inputs

    # ---------------------------------------------------------------- the choice

    def forward(
        self,
        features: Tensor,
        candidates: Candidates,
        settings: Settings,
        queries: Tensor | None = None,
        inputs: TrainingInputs | None = None,
    ) -> Selection:
        """Choose.

        Args:
            features: ``[B, H, N, F]`` from ``keys``.
            candidates: what may be kept.
            settings: of this call.
            queries: ``[B, Q, D]`` for scorers with ``per_query``.
            inputs: from ``training_inputs``.

        Returns:
            The selection; it keeps exactly ``min(k, valid)`` positions per row, plus the protected ones.
        """
        if queries is not None and self.estimator.detaches:
            queries = queries.detach()
        with full_precision(features.device):
            scores = self.scorer("score", features, queries)
            if self._is_plain(candidates, settings):
                return self._choose_indices(scores, candidates, settings)
            return self._choose_mask(scores, features, candidates, settings, inputs)

    def _is_plain(self, candidates: Candidates, settings: Settings) -> bool:
        """Whether every row keeps its best K of N: then sorting tells the indices, and no mask is made."""
        return (
            candidates.valid is None
            and candidates.protected is None
            and settings.forced is None
            and not settings.drawing
            and not isinstance(self.scorer, Sequential)
            and not self.scorer.monotonic
            and not self.runs_masked(settings)
            and not self.data_dependent
            and self.config.estimator != "soft"
        )

    def _choose_indices(self, scores: Tensor, candidates: Candidates, settings: Settings) -> Selection:
        first, last = candidates.ends.first, int(candidates.ends.last)
        n = scores.shape[-1]
        slots = self.budget(drawing=False).slots(n - first - last) + first + last
        ranked = scores
        if first or last:
            # protected rows rank above all others, so that one sort places them too
            ranked = nn.functional.pad(scores[..., first : n - last], (first, last), value=torch.inf)
        # stable: of equal scores the lower index is kept
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
        return Selection(
            self.site,
            None,
            None,
            None,
            scores,
            slots=slots,
            dense=True,
            indices=best.sort(dim=-1).values,
            protected_ends=(first, last),
        )

    def _choose_mask(
        self,
        scores: Tensor,
        features: Tensor,
        candidates: Candidates,
        settings: Settings,
        inputs: TrainingInputs | None,
    ) -> Selection:
        n = scores.shape[-1]
        everything = candidates.valid is None
        dense = everything and not self.data_dependent
        valid: Tensor = (
            scores.new_ones((1, 1, 1, n), dtype=torch.bool) if candidates.valid is None else candidates.valid
        )
        # torch.broadcast_shapes would take longer than the choice
        shape = tuple(size if other == 1 else other for size, other in zip(scores.shape, valid.shape, strict=True))
        scores, valid = scores.expand(shape), valid.expand(shape)
        free, protected = valid, candidates.protected
        if protected is None and candidates.ends.rows:
            protected = candidates.ends.mask((1, n), None, scores.device)[:, None, None]  # type: ignore[index]
        if protected is not None:
            free = (~protected).expand(shape) if everything else valid & ~protected
            protected = protected if everything else valid & protected
        masked = self.runs_masked(settings)
        if settings.forced is not None:
            mask = self._forced(settings.forced, shape) & valid
            mask = mask if protected is None else mask | protected
            slots, full, lengths = self._count(mask, masked)
            return Selection(
                self.site,
                mask,
                valid,
                protected,
                scores,
                slots=slots,
                dense=full,
                masked=masked,
                lengths=lengths,
                counted=True,
            )
        extra = candidates.ends.rows
        budget = self.budget(drawing=settings.drawing, final=settings.final)
        if dense:  # as many candidates in every row, so nothing is counted
            k = torch.full(shape[:-1], budget.slots(n - extra), device=scores.device)
        else:
            k = budget.count(scores.detach(), free)
        bound = n if candidates.bound is None else candidates.bound
        slots = budget.slots(bound - extra)
        sampling = self._sampling(scores, free, inputs, settings) if settings.drawing else None
        choice, scores = self._choose(scores, features.expand(shape[0], -1, -1, -1), k, free, slots, sampling)
        mask, gates = choice.mask, self._gates(choice, free, sampling, settings)
        if gates is not None and self.config.soft_rate and sampling is not None:
            mask, gates = self._soften(mask, gates, free, sampling, settings)
        if protected is not None:
            mask = mask | protected
            gates = None if gates is None else gates.masked_fill(protected, 1.0)
        # of monotonic choices the last find less left than the budget
        full, lengths = dense and not self.loose(settings) and not self.scorer.monotonic, None
        if self.config.estimator == "soft" or self.loose(settings):
            slots = bound - extra
        elif (self.data_dependent or self.config.pack) and not (settings.drawing and masked):
            (slots, full, lengths), extra = self._count(mask, masked), 0
        return Selection(
            self.site,
            mask,
            valid,
            protected,
            scores,
            gates,
            choice.log_prob,
            choice.entropy,
            self._penalty(choice, inputs),
            None if inputs is None else inputs.summary,
            slots=slots + extra,
            dense=full,
            masked=masked,
            lengths=lengths,
            counted=self.data_dependent,
        )

    def _forced(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A mask to replay, ``[B, H, Q, N]``, at the candidates that are there."""
        if any(given not in (1, size) for given, size in zip(mask.shape, shape, strict=True)):
            raise HardAttentionError(
                f"the selection to replay at '{self.site}' has the shape {list(mask.shape)}; the choice there is {list(shape)}. Replay a "
                "recording on the batch it was made on, under the same hf_hardattn.execution: masked sites drop no rows."
            )
        return mask.expand(shape)

    def _choose(
        self, scores: Tensor, features: Tensor, k: Tensor, free: Tensor, slots: int, sampling: Sampling | None
    ) -> tuple[Choice, Tensor]:
        """The estimator's choice among the ``free`` positions, and the scores that ranked them."""
        if isinstance(self.scorer, Sequential):
            return look(
                self.scorer,
                self.estimator,
                features,
                k.expand(scores.shape[:-1]),
                free,
                slots=slots,
                sampling=sampling,
                halts=self.halts,
            )
        if self.scorer.monotonic:
            passed = (features[..., -1] > 0.5).expand(scores.shape[0], -1, -1)
            k = k.expand(scores.shape[:-1])
            return read_on(self.estimator, scores, k, free, passed, slots=slots, sampling=sampling), scores
        return self.estimator.choose(scores, k, free, slots=slots, sampling=sampling), scores

    def _sampling(self, scores: Tensor, free: Tensor, inputs: TrainingInputs | None, settings: Settings) -> Sampling:
        """How this training choice is drawn; ``scores`` and ``free`` are ``[B, H, Q, N]``."""
        temperature = self.now(self.temperature, settings.final)
        backward: float | Tensor | None = None
        if self.backward_temperature is not None:
            backward = self.now(self.backward_temperature, settings.final)
        elif self.config.backward_temperature == "adaptive":
            backward = _spread(scores.detach(), free).clamp(min=temperature)
        posterior = None
        if self.posterior is not None and inputs is not None and inputs.target is not None:
            posterior = scores.detach() + self.posterior(inputs.keys, inputs.target, scores.shape[2])
        return Sampling(
            uniform=lambda size: uniform(size, scores.device, max(0, len(size) - scores.dim())),
            temperature=temperature,
            backward_temperature=backward,
            exploration=self.now(self.exploration, settings.final),
            posterior=posterior,
        )

    def _gates(self, choice: Choice, free: Tensor, sampling: Sampling | None, settings: Settings) -> Tensor | None:
        """Gates of masked training; elsewhere nothing is left of what they would weigh."""
        if choice.gates is None or not settings.drawing or not self.runs_masked(settings):
            return None
        if self.posterior is not None and sampling is not None and sampling.posterior is None:
            # no target: a gradient of zero rather than none, since distributed training waits for every parameter
            return choice.gates + 0.0 * torch.stack([p.float().sum() for p in self.posterior.parameters()]).sum()
        return choice.gates

    def _soften(
        self, mask: Tensor, gates: Tensor, free: Tensor, sampling: Sampling, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        """Let some rows of the batch keep everything."""
        soft = sampling.uniform((mask.shape[0], 1, 1, 1)) < self.now(self.soft_rate, settings.final)
        return torch.where(soft, free, mask), torch.where(soft, free + (gates - gates.detach()), gates)

    def _penalty(self, choice: Choice, inputs: TrainingInputs | None) -> Tensor | None:
        target = None if inputs is None else inputs.target
        penalty = choice.penalty
        if penalty is None or target is None or penalty.shape[-1] != target.shape[1] or target.shape[1] == 1:
            return penalty
        present = (target != 0).any(-1)[:, None]  # a padding query has no target to explain
        return penalty * present * (present.numel() / present.sum().clamp(min=1))

    def _count(self, mask: Tensor, masked: bool) -> tuple[int, bool, tuple[int, ...] | None]:
        """Slots that a choice needs, whether every row fills them, and the length of each row where rows are packed.

        The one place that waits for the device. A replayed choice is packed where the choice itself would be, or last bits
        would differ.
        """
        kept = mask.sum(-1)
        most, least = (int(number) for number in torch.stack((kept.max(), kept.min())).tolist())
        slots = max(1, most)
        wanted = self.data_dependent if self.config.pack is None else self.config.pack
        packs = wanted and not masked and kept.shape[1:].numel() == 1 and least < most
        return slots, least == slots, tuple(kept.flatten().tolist()) if packs else None


def full_precision(device: torch.device) -> Any:
    """Leave autocast: scores, noise and log-probabilities are fp32 in every training loop."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def _places(states: Tensor, valid: Tensor | None, past: int | Tensor) -> Tensor:
    """The place of each position in its row, int64 ``[B, N]``; padding is not counted."""
    if valid is None:
        places = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
    else:
        places = (valid.cumsum(-1) - 1).clamp(min=0)
    return places + past if isinstance(past, Tensor) or past > 0 else places


def _spread(scores: Tensor, free: Tensor) -> Tensor:
    """Standard deviation of each row's scores over its free positions, ``[..., 1]``."""
    count = free.sum(-1, keepdim=True).clamp(min=1)
    known = scores.masked_fill(~free, 0.0)
    variance = known.square().sum(-1, keepdim=True) / count - (known.sum(-1, keepdim=True) / count).square()
    return variance.clamp(min=0).sqrt()


def running(selector: Any) -> Selector:
    """The selector that works now, where PEFT keeps copies of it for several adapters."""
    copies = getattr(selector, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return selector
    names = [] if selector.disable_adapters else [name for name in selector.active_adapters if name in copies]
    chosen: Any = copies[names[0]] if names else selector.original_module
    return chosen
