"""A selector: scorer, budget and estimator of one site, as a module."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import registry
from ..budget import Budget, budget_schedule, final_budget
from ..config import SiteConfig
from ..errors import HardAttentionError
from ..estimators import WITHOUT_TERMS
from ..schedules import Sampled, Schedule
from ..scorers import Projections, Scorer
from .auxiliary_head import AuxiliaryHead
from .candidates import Candidates, Protected, TrainingInputs
from .choosing import choose
from .context import ForwardContext, Settings
from .offloading import weights_in_place
from .posterior import Posterior
from .selection import Selection

ANNEAL = 0.4  # default share of the training over which a pathwise estimator's budget falls from everything


class Selector(nn.Module):
    """The module that makes the choice of one site.

    Args:
        site: name, ``tower.kind.layer``.
        config: the site's configuration.
        hidden_size: D of the candidates.
        query_size: D of the queries (for scorers with ``per_query``).
        heads: H of the host attention; used when ``config.per_head``.
        protected: rows that are always kept.
        causal: a query chooses among its past only.
        target_size: D of the target's states, for estimators that need the target.
        classes: number of classes, for estimators that need the class.

    Attributes:
        step, steps: optimizer step and number of training steps, for the schedules (set by ``set_step``).
        once: one choice serves all queries of a row.
        scores_features: the scorer's features are its scores.
        learned: the scorer has parameters; a control without parameters can train gathered with any estimator.
        keeps_all: nothing can be dropped here, whatever the scores.
        halts: a scorer of several glimpses may stop before the budget is spent.
        data_dependent: the number of kept positions depends on the scores.
        sorts: outside training every row keeps its best candidates, which sorting finds.
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
        classes: int = 0,
    ):
        super().__init__()
        self.site, self._config, self.causal = site, config, causal
        self.protected = protected or Protected()
        self.heads = heads if config.per_head else 1
        # the sizes of the weights: a selector is reused only if they are the same
        self.sizes: tuple[int, ...] = (hidden_size, query_size, self.heads, target_size)
        self.scorer = registry.load("scorers", config.scorer)(
            hidden_size=hidden_size, query_size=query_size, heads=self.heads, **config.scorer_options
        )
        self.once = not causal and not self.scorer.per_query
        self.scores_features = type(self.scorer).score is Scorer.score
        self.learned = next(self.scorer.parameters(), None) is not None
        self.estimator = registry.load("estimators", config.estimator)(**config.estimator_options)
        self.baseline = None
        # several samples serve as each other's baseline
        if "reward" in self.estimator.needs and self.estimator.samples == 1:
            self.baseline = registry.load("baselines", config.baseline)(**config.baseline_options)
            self.baseline.build(hidden_size)
        self.posterior = None
        if "target" in self.estimator.needs and self.learned:
            self.posterior = Posterior(hidden_size, target_size or hidden_size)
        self.head = None
        if "class" in self.estimator.needs and self.learned:
            self.head = AuxiliaryHead(hidden_size, classes)
            self.sizes = (*self.sizes, classes)
        self.step: int | None = None
        self.steps: int | None = None
        self._read_config()

    def _read_config(self) -> None:
        # Read once: a call needs these values at every site, and an attribute lookup in a module costs as much as a small kernel.
        config, site, scorer = self._config, self.site, self.scorer
        self.temperature = Schedule.parse(config.temperature, site)
        adaptive = config.backward_temperature in (None, "adaptive")
        self.backward_temperature = None if adaptive else Schedule.parse(config.backward_temperature, site)
        self.exploration = Schedule.parse(config.exploration, site)
        self.soft_rate = Schedule.parse(config.soft_rate, site)
        self.entropy_weight = Schedule.parse(config.entropy_weight, site)
        self.budget_schedule = budget_schedule(config.budget, site)
        self.final_budget = Budget.parse(final_budget(config.budget), site)
        soft = config.estimator == "soft"
        self.keeps_all = soft or (isinstance(config.budget, float) and config.budget == 1.0)
        self.halts = scorer.sequential and scorer.halts and not self.keeps_all
        self.data_dependent = (self.final_budget.data_dependent or self.halts) and not soft
        self.sorts = self.once and not (soft or scorer.monotonic or scorer.sequential)
        self.annealing = self._annealing()

    def _annealing(self) -> Schedule | None:
        """Return the minimum share to keep in training, over the steps; None if the budget is not annealed."""
        budget, share = self.config.budget, self.config.anneal
        if share is None:
            share = 0.0 if self.estimator.trains_gathered else ANNEAL
        if not share or isinstance(budget, (str, dict)) or self.keeps_all:
            return None
        return Schedule(1.0, budget if isinstance(budget, float) else 0.0, steps=float(share))

    @property
    def config(self) -> SiteConfig:
        """The configuration of the site; it may only be replaced by one with the same scorer, estimator and baseline."""
        return self._config

    @config.setter
    def config(self, config: SiteConfig) -> None:
        self._config = config
        self._read_config()

    def reset_parameters(self) -> None:
        """Initialise all weights; called by Transformers for weights that are in no checkpoint."""
        for part in (self.scorer, self.estimator, self.baseline, self.posterior, self.head):
            if part is not None:
                part.reset_parameters()

    def extra_repr(self) -> str:
        config = self.config
        return f"'{self.site}', scorer={config.scorer}, budget={config.budget}, estimator={config.estimator}"

    # ---------------------------------------------------------------- facts of the configuration

    @property
    def lacks_length(self) -> bool:
        """Whether the budget would be annealed if the number of training steps were known."""
        return self.annealing is not None and self.config.anneal is None and not self.steps

    @property
    def terms(self) -> tuple[str, ...]:
        """What a choice in training may add to the model's loss, in words; empty if it adds nothing."""
        config, estimator = self.config, self.estimator
        adds = {
            f"the term of estimator '{config.estimator}'": not estimator.exact_budget
            or bool(set(estimator.needs) - WITHOUT_TERMS),
            "the entropy bonus": not self.entropy_weight.constant or self.entropy_weight.end != 0,
            f"the penalty of scorer '{config.scorer}'": self.halts,
        }
        return () if config.estimator == "soft" else tuple(term for term, added in adds.items() if added)

    @property
    def masked(self) -> bool:
        """Whether a forward in the module's present mode runs masked instead of gathered."""
        return self.runs_masked(Settings(drawing=self.training))

    def runs_masked(self, settings: Settings) -> bool:
        """Return whether the choice weighs all candidates (pathwise estimators need it to train) instead of dropping some."""
        execution = settings.execution or self._config.execution
        if execution == "auto":
            return settings.drawing and not self.estimator.trains_gathered and self.learned
        return execution == "masked"

    def loose(self, settings: Settings) -> bool:
        """Return whether this choice may keep more than the budget, because the estimator keeps its own count or some rows are soft."""
        return settings.drawing and (not self.estimator.exact_budget or bool(self.config.soft_rate))

    def budget(self, *, drawing: bool, final: bool = False) -> Budget:
        """Return the budget in force: that of the current step in training, the end of the schedule in evaluation."""
        schedule = self.budget_schedule
        if schedule is not None and drawing:
            return Budget.parse(float(self.now(schedule, final)), self.site)
        if not drawing or final or self.annealing is None or self.lacks_length:
            return self.final_budget
        return replace(self.final_budget, least=float(self.now(self.annealing)))

    def now(self, schedule: Schedule | Sampled, final: bool = False) -> float:
        """Return the value of a schedule at the current step, or at its end."""
        if schedule.constant or final:
            return schedule.end
        if self.step is None:
            # no steps are counted: a model that is not being trained uses the end of its schedules
            if not self.training:
                return schedule.end
            warnings.warn(
                f"the schedule of '{self.site}' does not advance: it is still at step 0. Add HardAttentionCallback() to the Trainer, "
                "or call hf_hardattn.set_step(model, step) after each optimizer step.",
                stacklevel=2,
            )
            self.step = 0
        if isinstance(schedule, Schedule) and schedule.relative and not self.steps:
            raise HardAttentionError(
                f"steps={schedule.steps} of a schedule at '{self.site}' is a share of the training, but the length of the training is not known. Call "
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
        """Return features of each position on its own, fp32 ``[B, H, N, F]``, for ``forward`` and for caching with the attention's keys.

        Args:
            states: ``[B, N, D]``.
            settings: settings of this call.
            valid: bool ``[B, N]`` or None (all); padding is not counted as a place.
            past: number of positions already cached.
            projections: projections of the host attention.
        """
        scorer = self.scorer
        if settings.drawing and scorer.draws:
            return scorer("draw", states)
        positions = _places(states, valid, past) if scorer.needs_positions else None
        if self.estimator.detaches:
            states = states.detach()
        if projections is not None:
            projections = replace(projections, valid=valid)
        with full_precision(states.device):
            return scorer("keys", states, positions, projections)

    def training_inputs(
        self, states: Tensor, valid: Tensor | None, context: ForwardContext, settings: Settings
    ) -> TrainingInputs | None:
        """Return further inputs of a choice in training, from the candidates ``[B, N, D]``; None if it needs none."""
        if not settings.drawing:
            return None
        summarised = self.baseline is not None and self.baseline.needs_summary
        if not (summarised or self.posterior is not None or self.head is not None):
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
            with full_precision(states.device), weights_in_place(self.posterior):
                inputs.keys = self.posterior.keys(states)
        if self.head is not None and context.classes is not None:
            inputs.classes = context.classes
            if len(context.classes) != len(states):
                raise HardAttentionError(
                    f"'{self.site}' chooses in {len(states)} rows, and there are classes of {len(context.classes)} examples; estimator "
                    "'cropr' needs the class of each row. Use estimator 'simple'."
                )
            with full_precision(states.device), weights_in_place(self.head):
                inputs.values = self.head.values(states)
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
        """Choose the positions to keep.

        Args:
            features: ``[B, H, N, F]`` from ``keys``.
            candidates: what may be kept.
            settings: settings of this call.
            queries: ``[B, Q, D]`` for scorers with ``per_query``.
            inputs: from ``training_inputs``.

        Returns:
            The selection; it keeps exactly ``min(k, valid)`` positions per row, plus the protected ones.
        """
        if queries is not None and self.estimator.detaches:
            queries = queries.detach()
        with full_precision(features.device):
            if self.scores_features:  # no module has to be called
                scores = Scorer.score(self.scorer, features)
            else:
                scores = self.scorer("score", features, queries)
            return choose(self, scores, features, candidates, settings, inputs)


def full_precision(device: torch.device) -> Any:
    """Disable autocast, so that scores, noise and log-probabilities are fp32 in every training loop."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def _places(states: Tensor, valid: Tensor | None, past: int | Tensor) -> Tensor:
    """Return the place of each position in its row, int64 ``[B, N]``; padding is not counted."""
    if valid is None:
        places = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
    else:
        places = (valid.cumsum(-1) - 1).clamp(min=0)
    return places + past if isinstance(past, Tensor) or past > 0 else places


def running(selector: Any) -> Selector:
    """Return the active selector, if PEFT keeps copies of it for several adapters."""
    copies = getattr(selector, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return selector
    names = [] if selector.disable_adapters else [name for name in selector.active_adapters if name in copies]
    chosen: Any = copies[names[0]] if names else selector.original_module
    return chosen
