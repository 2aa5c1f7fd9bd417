"""The configuration: one dict in config.json, validated once, names and numbers only."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from . import registry
from .budget import Budget
from .errors import HardAttentionError, unknown
from .recipes import expand
from .schedules import Schedule

SCHEMA_VERSION = 1
EXECUTIONS = ("auto", "gathered", "masked")


@dataclass(frozen=True)
class SiteConfig:
    """What happens at one site.

    Attributes:
        budget: positions kept per row: int >= 1, float in (0, 1] of the valid positions, ``"threshold:t"``, ``"top_p:p"``,
            or a schedule of floats over optimizer steps (evaluation uses its end).
        scorer, scorer_options: name in ``scorers/`` and its keyword options.
        estimator, estimator_options: name in ``estimators/`` and its keyword options.
        baseline, baseline_options: name in ``baselines/``; used by score-function estimators only.
        temperature: number > 0 or schedule; of the sampling law or relaxation, in training only.
        backward_temperature: number > 0 or schedule, of the surrogate that only the gradient sees; ``"adaptive"`` takes the
            spread of each row's scores where that is larger than ``temperature``, so that a confident scorer keeps its
            gradient; None: ``temperature``.
        exploration: number in [0, 1] or schedule; probability that a row keeps positions drawn uniformly, in training.
        soft_rate: number in [0, 1] or schedule; probability that a row looks everywhere, in (masked) training.
        entropy_weight: number >= 0 or schedule; weight of the entropy bonus (exploration) in the training loss.
        score_function_weight: number >= 0; weight of the score-function surrogate in the training loss.
        per_head: each attention head chooses for itself (``self`` and ``cross`` only).
        share_selection: the first ``self`` (or ``cross``) site of a tower chooses for the later ones that are configured alike,
            up to the next ``tokens`` site, which changes what there is to choose from. One scorer, one choice, one gather.
        execution: ``auto`` | ``masked`` | ``gathered``.
        pack: rows that keep different counts are computed on end to end (gathered, one choice a row), instead of all at the length of
            the longest. None: where the host must ask for the counts anyway (thresholds, top-p, looks that may stop); True: also
            where padding alone makes them differ, which waits for the device once a choice and does not compile; False: never.
    """

    budget: Any = 0.5
    scorer: str = "linear"
    scorer_options: dict[str, Any] = field(default_factory=dict)
    estimator: str = "simple"
    estimator_options: dict[str, Any] = field(default_factory=dict)
    baseline: str = "moving_average"
    baseline_options: dict[str, Any] = field(default_factory=dict)
    temperature: Any = 1.0
    backward_temperature: Any = None
    exploration: Any = 0.0
    soft_rate: Any = 0.0
    entropy_weight: Any = 0.0
    score_function_weight: float = 1.0
    per_head: bool = False
    share_selection: bool = False
    execution: str = "auto"
    pack: bool | None = None

    def validate(self, where: str) -> None:
        """Raise ``HardAttentionError`` for anything out of range; ``where`` names the site or pattern."""
        if isinstance(self.budget, dict):
            schedule = Schedule.parse(self.budget, f"{where}, budget")
            Budget.parse(float(schedule.start), where)
            Budget.parse(float(schedule.end), where)
        else:
            Budget.parse(self.budget, where)
        for kind in ("scorer", "estimator", "baseline"):
            member, options = registry.load(f"{kind}s", getattr(self, kind)), getattr(self, f"{kind}_options")
            if not isinstance(options, Mapping):
                raise HardAttentionError(
                    f"{kind}_options={options!r} is not a dict at '{where}'; give keyword options by name."
                )
            known = set(inspect.signature(member).parameters) - {"hidden_size", "query_size", "heads"}
            for name in options:
                if name not in known:
                    raise unknown(f"option of {kind} '{getattr(self, kind)}':", name, known, where)
        for name in ("temperature", "backward_temperature"):
            value = getattr(self, name)
            if name == "backward_temperature" and (value is None or value == "adaptive"):
                continue
            schedule = Schedule.parse(value, f"{where}, {name}")
            if min(schedule.start, schedule.end) <= 0:
                raise HardAttentionError(f"{name}={value!r} is out of range at '{where}'; it must stay > 0.")
        for name in ("exploration", "soft_rate"):
            schedule = Schedule.parse(getattr(self, name), f"{where}, {name}")
            if min(schedule.start, schedule.end) < 0 or max(schedule.start, schedule.end) > 1:
                raise HardAttentionError(
                    f"{name}={getattr(self, name)!r} is out of range at '{where}'; it is a probability, in [0, 1]."
                )
        entropy = Schedule.parse(self.entropy_weight, f"{where}, entropy_weight")
        if min(entropy.start, entropy.end, self.score_function_weight) < 0:
            raise HardAttentionError(
                f"a loss weight is negative at '{where}'; entropy_weight and score_function_weight are >= 0."
            )
        if not isinstance(self.share_selection, bool):
            raise HardAttentionError(
                f"share_selection={self.share_selection!r} is not a choice at '{where}'; use True (layers share one selection) or False."
            )
        if self.pack not in (None, True, False):
            raise HardAttentionError(
                f"pack={self.pack!r} is not a choice at '{where}'; use None (where the host knows the counts), True (always) or False (never)."
            )
        if self.execution not in EXECUTIONS:
            raise unknown("execution", self.execution, EXECUTIONS, where)
        estimator = registry.load("estimators", self.estimator)(**self.estimator_options)
        if registry.load("scorers", self.scorer).sequential:
            asks = sorted({"teacher", "choices", "target"} & set(estimator.needs))
            if asks:
                raise HardAttentionError(
                    f"scorer '{self.scorer}' chooses in several looks at '{where}'; estimator '{self.estimator}' (needs {', '.join(asks)}) reads "
                    "the scores of one. Use an estimator with gates or a reward ('simple', 'rloo' ...)."
                )
            if not estimator.exact_budget and self.estimator != "soft":
                raise HardAttentionError(
                    f"estimator '{self.estimator}' at '{where}' keeps a number of its own in training; scorer '{self.scorer}' spreads a count over "
                    "its looks. Use halting_cost to stop early, with an estimator that keeps exactly its budget ('simple', 'rloo' ...)."
                )
            if isinstance(self.budget, str):
                raise HardAttentionError(
                    f"budget={self.budget!r} at '{where}' counts by the scores; scorer '{self.scorer}' needs a count to spread over its looks. "
                    "Use an int or a ratio, with halting_cost to stop early."
                )
        if self.soft_rate and estimator.trains_gathered:
            raise HardAttentionError(
                f"soft_rate={self.soft_rate!r} at '{where}' has rows look everywhere; estimator '{self.estimator}' computes on the kept "
                "positions only. Use 0, or an estimator that trains masked ('simple', 'straight_through' ...)."
            )


SITE_FIELDS = tuple(f.name for f in fields(SiteConfig))


@dataclass(frozen=True)
class HardAttentionConfig(SiteConfig):
    """Where a model looks. The fields of ``SiteConfig`` are every site's defaults.

    Attributes:
        sites: glob to overrides (``{"vision.tokens.*": {"budget": 0.5}}``; later globs win), or a list of globs; ``None``
            takes the architecture's recommended sites.
        self_distillation: number >= 0 or schedule; weight of KL(soft model's predictions || hard model's) in the training loss.
            Costs a soft forward pass a step.
        recipe: name in ``recipes``; it sets the fields that stand at their defaults. They are what is kept, not the name: a
            saved model does not change with a recipe.
        restore: give ``last_hidden_state`` its full length again, all-zero rows where nothing was computed; ``None`` decides by
            the model (T5 and masked image modelling restore).
        schema_version: of this dict.

    Example:
        >>> HardAttentionConfig(sites={"vision.tokens.3": {"budget": 0.7}}, scorer="linear").sites
        {'vision.tokens.3': {'budget': 0.7}}
    """

    sites: Any = None
    self_distillation: Any = 0.0
    recipe: InitVar[str | None] = None
    restore: bool | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self, recipe: str | None) -> None:
        if not isinstance(self.schema_version, int) or self.schema_version > SCHEMA_VERSION:
            raise HardAttentionError(
                f"schema_version={self.schema_version!r} is newer than this hf_hardattn knows ({SCHEMA_VERSION}); "
                "a newer release wrote this configuration. Upgrade with: pip install -U hf-hardattn"
            )
        sites = self.sites
        if isinstance(sites, str):
            sites = [sites]
        if sites is not None and not isinstance(sites, Mapping):
            sites = {pattern: {} for pattern in sites}
        if sites is not None:
            if not sites:
                raise HardAttentionError("sites is empty; name at least one site, or None for the recommended ones.")
            sites = {str(pattern): dict(overrides or {}) for pattern, overrides in sites.items()}
        object.__setattr__(self, "sites", sites)
        if recipe is not None:
            for name, value in expand(recipe, {f.name: getattr(self, f.name) for f in fields(self)}).items():
                object.__setattr__(self, name, value)
        self.validate("the top level")
        weight = Schedule.parse(self.self_distillation, "self_distillation")
        if min(weight.start, weight.end) < 0:
            raise HardAttentionError(
                f"self_distillation={self.self_distillation!r} is negative; a loss weight is >= 0."
            )
        for pattern, overrides in (self.sites or {}).items():
            self._site(pattern, [overrides]).validate(pattern)

    def _site(self, where: str, overrides: Iterable[Mapping[str, Any]]) -> SiteConfig:
        merged = {name: getattr(self, name) for name in SITE_FIELDS}
        for override in overrides:
            for name, value in override.items():
                if name not in SITE_FIELDS:
                    raise unknown("site field", name, SITE_FIELDS, where)
                # options belong to the member they were written for
                if name in ("scorer", "estimator", "baseline") and value != merged[name]:
                    merged[f"{name}_options"] = {}
                merged[name] = value
            merged |= dict(override)
        return SiteConfig(**merged)

    def resolve(
        self, names: Iterable[str], recommended: Iterable[str], where: str, ignore: Iterable[str] = ()
    ) -> dict[str, SiteConfig]:
        """Give each selected site of a model its configuration.

        Args:
            names: sites that exist, in order.
            recommended: globs used when ``sites`` is None.
            where: the model's class, for errors.
            ignore: towers the architecture has elsewhere but this model lacks; a pattern for one of them may match nothing.

        Raises:
            HardAttentionError: a pattern matches no site.
        """
        names = list(names)
        patterns = self.sites if self.sites is not None else {pattern: {} for pattern in recommended}
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names) and pattern.split(".")[0] not in ignore:
                listed = (
                    ", ".join(map(repr, names)) if len(names) <= 8 else f"{names[0]!r}, {names[1]!r} ... {names[-1]!r}"
                )
                raise HardAttentionError(f"no site matches {pattern!r} in {where}; it has: {listed}.")
        resolved = {}
        for name in names:
            matching = [overrides for pattern, overrides in patterns.items() if fnmatchcase(name, pattern)]
            if matching:
                resolved[name] = self._site(name, matching)
        return resolved

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, complete, as written to config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HardAttentionConfig:
        """Read the JSON form; unknown keys raise."""
        known = {*(f.name for f in fields(cls)), "recipe"}
        if isinstance(data.get("schema_version", 1), int) and data.get("schema_version", 1) <= SCHEMA_VERSION:
            for name in data:
                if name not in known:
                    raise unknown("key of hard_attention:", name, known)
        return cls(**{name: value for name, value in data.items() if name in known})

    @classmethod
    def parse(cls, value: Any) -> HardAttentionConfig:
        """Accept a ``HardAttentionConfig`` or its dict."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise HardAttentionError(
            f"hard_attention={value!r} is not a configuration; give a HardAttentionConfig or its dict."
        )

    def replace(self, **changes: Any) -> HardAttentionConfig:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)
