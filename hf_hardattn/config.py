"""The configuration: one dict in config.json with names and numbers only, validated once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, InitVar, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from . import registry
from .budget import BudgetLike
from .errors import HardAttentionError, did_you_mean, shown, some_names, unknown
from .fields import READERS, choice, is_configuration, read_field, scheduled_weight, write_field
from .options import check_options
from .overrides import read_sites
from .recipes import expand
from .schedules import write_schedule
from .schemas import SCHEMA_VERSION, check_schema_version, with_former_defaults

TOP = "the top level"
AUTO = "auto"  # the scorer that suits the kind of site; replaced by a name when the configuration is attached


@dataclass(frozen=True, eq=False)
class SiteConfig:
    """The configuration of one site. Its fields are checked when it is created.

    Attributes:
        budget: positions kept per row: int >= 1, float in (0, 1] of the valid positions, ``"threshold:t"``, ``"top_p:p"``,
            or a schedule of floats over optimizer steps (evaluation uses its end). In JSON ``{"count": 8}`` and ``{"ratio": 0.5}``.
            ``{"sample": [0.1, 1.0]}`` draws a ratio at each training step, so that the model can run at all of them; evaluation uses the
            lower one until ``set_budget`` changes it.
        anneal: number in [0, 1]; share of the training over which a count or a ratio falls from everything to ``budget``, so that the
            selector learns from a model that still sees everything. 0 disables annealing. None means 0.4 for estimators that train
            masked, if the number of steps is known (``HardAttentionCallback``, ``set_step``), and 0 for those that train gathered.
        scorer, scorer_options: name in ``scorers/``, or of a plug-in, and its keyword options. ``"auto"`` is ``conv`` at the inputs of an
            image tower, ``mlp`` at other inputs, and ``linear`` elsewhere; the configuration of a model stores the resolved name.
        estimator, estimator_options: name in ``estimators/``, or of a plug-in, and its keyword options.
        baseline, baseline_options: name in ``baselines/``, or of a plug-in; used by score-function estimators only.
        temperature: number in [1e-6, 1e6] or schedule; temperature of the sampling distribution or relaxation, in training only.
        backward_temperature: number in [1e-6, 1e6] or schedule; temperature of the surrogate that only the gradient sees. ``"adaptive"``
            uses the standard deviation of each row's scores where it is larger than ``temperature``, so that a confident scorer keeps its
            gradient. None uses ``temperature``.
        exploration: number in [0, 1] or schedule; probability, in training, that a row keeps positions drawn uniformly.
        soft_rate: number in [0, 1] or schedule; probability, in (masked) training, that a row is computed with full attention.
        entropy_weight: number in [0, 1e6] or schedule; weight of the entropy bonus (exploration) in the training loss.
        score_function_weight: number in [0, 1e6]; weight of the score-function surrogate in the training loss.
        per_head: each attention head chooses for itself (``self`` and ``cross`` only).
        share_selection: the first ``self`` (or ``cross``) site of a tower chooses for the later ones that have the same configuration, up
            to the next ``tokens`` site, which changes the candidates. There is then one scorer, one choice and one gather.
        execution: ``auto`` | ``masked`` | ``gathered``.
        pack: whether rows that keep different counts are packed end to end (gathered, one choice per row) instead of being padded to the
            longest. None: if the host needs the counts anyway (thresholds, top-p, glimpses that may stop); True: also if only padding
            makes them differ, which waits for the device once per choice and does not compile; False: never.
    """

    budget: BudgetLike = 0.5
    anneal: float | None = None
    scorer: str = AUTO
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

    def __post_init__(self) -> None:
        self._read("SiteConfig")

    def _read(self, where: str) -> None:
        for name in READERS:
            object.__setattr__(self, name, read_field(name, getattr(self, name), where))

    def __repr__(self) -> str:
        """Show only the fields that differ from their defaults."""
        plain = {f.name: {} if f.default is MISSING else f.default for f in fields(self)}  # the options default to {}
        named = [f"{name}={value!r}" for name in plain if (value := getattr(self, name)) != plain[name]]
        return f"{type(self).__name__}({', '.join(named)})"

    def __eq__(self, other: object) -> bool:
        # Compare the JSON forms, in which budget=1 (one position) and budget=1.0 (all positions) differ.
        return type(other) is type(self) and isinstance(other, SiteConfig) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the complete JSON form."""
        return {name: write_field(name, getattr(self, name)) for name in READERS}

    def validate(self, where: str) -> None:
        """Raise ``HardAttentionError`` for names that do not exist, wrong options, and incompatible fields.

        Args:
            where: the site or pattern, for the error message.
        """
        for kind in ("scorer", "estimator", "baseline"):
            name, options = getattr(self, kind), getattr(self, f"{kind}_options")
            if kind == "scorer" and name == AUTO:
                self._check_automatic(where)
            else:
                check_options(registry.load(f"{kind}s", name), name, options, where)
        if self.scorer != AUTO and registry.load("scorers", self.scorer).sequential:
            self._check_sequential(where)
        if self.soft_rate and registry.load("estimators", self.estimator).trains_gathered:
            raise HardAttentionError(
                f"soft_rate={shown(self.soft_rate)} at {shown(where)} computes some rows with full attention; estimator '{self.estimator}' computes only "
                "the kept positions. Use 0, or an estimator that trains with masked execution ('simple', 'straight_through' ...)."
            )

    def _check_automatic(self, where: str) -> None:
        """Refuse scorer options while the scorer is ``"auto"``."""
        if self.scorer_options:
            raise HardAttentionError(
                f"scorer_options={shown(self.scorer_options)} at {shown(where)} belong to no scorer; scorer 'auto' is replaced by a named one when "
                f"hard attention is applied. Name the scorer: {', '.join(map(repr, registry.names('scorers')))}."
            )

    def _check_sequential(self, where: str) -> None:
        """Refuse settings that do not work with a scorer that spreads a count over several glimpses."""
        estimator = registry.load("estimators", self.estimator)
        asks = sorted({"teacher", "choices", "target", "class"} & set(estimator.needs))
        if asks:
            raise HardAttentionError(
                f"scorer '{self.scorer}' selects in several glimpses at {shown(where)}; estimator '{self.estimator}' (needs {', '.join(asks)}) "
                "supports only one. Use an estimator with gates or a reward ('simple', 'rloo' ...)."
            )
        if not estimator.exact_budget and self.estimator != "soft":
            raise HardAttentionError(
                f"estimator '{self.estimator}' at {shown(where)} does not keep an exact count in training; scorer '{self.scorer}' divides a count "
                "among its glimpses. Use halting_cost to stop early, with an estimator that keeps exactly its budget ('simple', 'rloo' ...)."
            )
        if isinstance(self.budget, str):
            raise HardAttentionError(
                f"budget={shown(self.budget)} at {shown(where)} lets the scores decide the count; scorer '{self.scorer}' divides a fixed count among its "
                "glimpses. Use an int or a ratio, with halting_cost to stop early."
            )


@dataclass(frozen=True, eq=False, repr=False)
class HardAttentionConfig(SiteConfig):
    """The configuration of a hard model. The fields of ``SiteConfig`` are the defaults of every site.

    Attributes:
        sites: dict from glob to overrides (``{"vision.tokens.*": {"budget": 0.5}}``; later globs win) or just to a budget
            (``{"vision.inputs": 0.5}``), or a list of globs; ``None`` uses the architecture's recommended sites.
        self_distillation: number in [0, 1e6] or schedule; weight of KL(soft model's predictions || hard model's) in the training loss.
            It costs one soft forward pass per step. The predictions are the outputs with ``logits`` in their names.
        recipe: name in ``recipes``; it sets the fields that have their default values. The fields are stored, not the name, so that a
            saved model does not change if a recipe does.
        restore: whether ``last_hidden_state`` gets its full length back, with all-zero rows where nothing was computed; ``None`` depends
            on the model (T5 and masked image modelling restore it).
        schema_version: version of the dict that was read, 1 to 3; the newest version is always written.

    Raises:
        HardAttentionError: if any value is invalid; the message names the field, the rule, the place and the remedy.

    Examples:
        >>> HardAttentionConfig(sites={"vision.tokens.3": {"budget": 0.7}}, scorer="linear").sites
        {'vision.tokens.3': {'budget': 0.7}}
    """

    sites: Any = None
    self_distillation: Any = 0.0
    recipe: InitVar[str | None] = None
    restore: bool | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self, recipe: str | None) -> None:
        check_schema_version(self.schema_version)
        object.__setattr__(self, "schema_version", SCHEMA_VERSION)
        self._read(TOP)
        if recipe is not None:
            given = {f.name: getattr(self, f.name) for f in fields(self)}
            for name, value in expand(recipe, given).items():
                object.__setattr__(self, name, value)
        self.validate(TOP)
        checked = {repr({})}  # without overrides, a site has the settings of the top level
        for pattern, overrides in (self.sites or {}).items():
            if repr(overrides) not in checked:
                self._site([overrides]).validate(pattern)
                checked.add(repr(overrides))

    def _read(self, where: str) -> None:
        super()._read(where)
        object.__setattr__(self, "sites", read_sites(self.sites))
        weight = scheduled_weight("self_distillation", self.self_distillation, where)
        object.__setattr__(self, "self_distillation", weight)
        _RESTORE("restore", self.restore, where)

    def _site(self, overrides: Iterable[Mapping[str, Any]]) -> SiteConfig:
        merged = {name: getattr(self, name) for name in READERS}
        for override in overrides:
            for kind in ("scorer", "estimator", "baseline"):
                # Options belong to the scorer, estimator or baseline for which they were written.
                if override.get(kind, merged[kind]) != merged[kind]:
                    merged[f"{kind}_options"] = {}
            merged |= override
        # Bypass the constructor, which would repeat the checks that were made when this configuration was created.
        site = object.__new__(SiteConfig)
        vars(site).update(merged)
        return site

    def resolve(
        self, names: Iterable[str], recommended: Iterable[str], where: str, ignore: Iterable[str] = ()
    ) -> dict[str, SiteConfig]:
        """Return the configuration of each selected site of a model.

        Args:
            names: existing sites, in order.
            recommended: globs used when ``sites`` is None.
            where: the model's class, for errors.
            ignore: towers that other models of the architecture have but this one lacks; a pattern for one of them may match nothing.

        Raises:
            HardAttentionError: if a pattern matches no site, or the overrides of several patterns for a site are incompatible.
        """
        names = list(names)
        patterns = self.sites if self.sites is not None else {pattern: {} for pattern in recommended}
        matching: dict[str, list[Mapping[str, Any]]] = {name: [] for name in names}
        for pattern, overrides in patterns.items():
            matched = _matched(pattern, matching)
            if not matched and pattern.split(".")[0] not in ignore:
                near = did_you_mean(pattern, names)
                raise HardAttentionError(
                    f"no site matches {shown(pattern)} in {where}; it has: {some_names(names)}.{near}"
                )
            for name in matched:
                matching[name].append(overrides)
        resolved = {name: self._site(overrides) for name, overrides in matching.items() if overrides}
        for name, site in resolved.items():
            if len(matching[name]) > 1:  # a single pattern was checked when the configuration was created
                site.validate(name)
        return resolved

    def with_scorers(self, sites: Mapping[str, SiteConfig]) -> HardAttentionConfig:
        """Return a copy in which ``"auto"`` is replaced by the scorers that ``sites`` name.

        Args:
            sites: dict from site to its resolved configuration.

        Returns:
            A configuration that resolves to ``sites``. It keeps its globs if one scorer serves all sites; else it names each site.
        """
        scorers = {config.scorer for config in sites.values()}
        named = [self.scorer, *(overrides.get("scorer", self.scorer) for overrides in (self.sites or {}).values())]
        if AUTO not in named or not sites:
            return self
        if len(scorers) == 1:
            (scorer,) = scorers
            globs = self.sites and {
                pattern: {**overrides, "scorer": scorer} if overrides.get("scorer") == AUTO else overrides
                for pattern, overrides in self.sites.items()
            }
            return self.replace(scorer=scorer if self.scorer == AUTO else self.scorer, sites=globs)
        common = self.replace(scorer=next(iter(sites.values())).scorer, sites=None) if self.scorer == AUTO else self
        return common.naming(sites)

    def naming(self, sites: Mapping[str, SiteConfig]) -> HardAttentionConfig:
        """Return a copy that names each site instead of using globs, and resolves to ``sites``."""
        top = SiteConfig.to_dict(self)
        return self.replace(sites={site: _differing(config.to_dict(), top) for site, config in sites.items()})

    def sortable(self, names: Iterable[str]) -> bool:
        """Return whether the globs mean the same after sorting, so that a JSON file may sort them.

        Args:
            names: existing sites.
        """
        matching: dict[str, list[str]] = {name: [] for name in names}
        for pattern in self.sites or ():
            for name in _matched(pattern, matching):
                matching[name].append(pattern)
        return all(patterns == sorted(patterns) for patterns in matching.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the complete JSON form, as written to config.json; counts and ratios are marked as such."""
        sites = self.sites and {
            pattern: {name: write_field(name, value) for name, value in overrides.items()}
            for pattern, overrides in self.sites.items()
        }
        return {
            **super().to_dict(),
            "sites": sites,
            "self_distillation": write_schedule(self.self_distillation),
            "restore": self.restore,
            "schema_version": self.schema_version,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HardAttentionConfig:
        """Read the JSON form of this schema or an older one. Bare numbers are read as in Python: an int budget is a count.

        Raises:
            HardAttentionError: if it is not a dict, has a newer schema or an unknown key, or contains an invalid value.
        """
        if not isinstance(data, Mapping):
            raise HardAttentionError(
                f"hard_attention={shown(data)} is not a configuration; pass a HardAttentionConfig or its dict."
            )
        # Check this first: a newer schema may have keys and values that are unknown here.
        check_schema_version(data.get("schema_version", SCHEMA_VERSION))
        known = {*(f.name for f in fields(cls)), "recipe"}
        for name in data:
            if name not in known:
                raise unknown("key of hard_attention:", name, known)
        return cls(**with_former_defaults(data))

    @classmethod
    def parse(cls, value: Any) -> HardAttentionConfig:
        """Accept a ``HardAttentionConfig``, even one from another copy of this package, or its dict."""
        if isinstance(value, cls):
            return value
        return cls.from_dict(value.to_dict() if is_configuration(value) else value)

    def replace(self, **changes: Any) -> HardAttentionConfig:
        """Return a copy with some fields changed, validated again."""
        known = {*(f.name for f in fields(self)), "recipe"}
        for name in changes:
            if name not in known:
                raise unknown("field of HardAttentionConfig:", name, known)
        return replace(self, **changes)


def _matched(pattern: str, names: Collection[str]) -> list[str]:
    """Return the sites that a glob selects; the name of a site selects only that one."""
    return [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]


def _differing(own: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that turn the fields ``top`` into ``own``; options are reset where their scorer or estimator differs."""

    def differs(name: str) -> bool:
        return bool(own[name] != top[name])

    return {name: own[name] for name in own if differs(name) or differs(name.removesuffix("_options"))}


_RESTORE = choice({None: "the model decides", True: "full length", False: "kept rows only"})
