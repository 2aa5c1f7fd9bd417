"""Which estimator trains this model? Compares the gradients at every site with the exact one, where it can be computed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .. import registry
from ..api import apply
from ..errors import HardAttentionError
from ..modeling.selector import Selector
from ..recording import record, selectors
from ..unwrapping import refuse_offloaded, refuse_other_than_batch, refuse_sharded, unwrap
from .collapse import Collapse, find_collapse

_SUSPECT = 0.5  # cosine below which a mean gradient counts as pointing in another direction
_NOISY = 0.5  # relative noise of a mean above which it cannot serve as a reference
_LEGEND = """relative_sd: noise of one step's gradient over the size of its mean. bias: 1 - cosine of the mean gradient to the exact one, where all
selections can be tried. error: 1 - cosine of one step's gradient to the exact one, else to RLOO's mean; the smaller, the faster the scorer learns.
cosine_to_rloo: of the mean gradients. entropy: of the sampling distribution. distinct: different selections among the draws."""
_REFERENCE = {"estimator": "rloo", "estimator_options": {"samples": 8}}


@dataclass(frozen=True)
class Row:
    """The measurements of one estimator at one site. Gradients are those of the scorer's parameters.

    Attributes:
        site, estimator: names. biased: as declared by the estimator.
        relative_sd: root mean square of the gradient's noise, divided by the norm of its mean.
        bias: 1 - cosine of the mean gradient to the exact one; None if there are too many choices to enumerate.
        error: mean of 1 - cosine of a single step's gradient to the exact one, or to the reference if there is no exact one.
        cosine_to_rloo: cosine of the mean gradient to the mean of RLOO with 8 samples.
        entropy: entropy of the sampling law, in nats; None for a deterministic choice without one.
        distinct: number of different selections among the draws of a row, mean over rows, in [1, draws].
        failed: why there is no gradient, or None.
        suspect: the mean gradient points in another direction: its cosine to the exact one, or to that of RLOO if there is no exact
            one, is below 0.5.
    """

    site: str
    estimator: str
    biased: bool
    relative_sd: float | None = None
    bias: float | None = None
    error: float | None = None
    cosine_to_rloo: float | None = None
    entropy: float | None = None
    distinct: float | None = None
    failed: str | None = None
    suspect: bool = False


@dataclass
class Diagnosis:
    """The result of ``diagnose``: print it as a table, or call ``to_dict()``.

    Attributes:
        rows: a row for each site and estimator. collapses: findings of ``find_collapse``.
        draws: training steps per row. noise: maps a site to the noise left in the mean of RLOO's gradients, relative to its norm.
    """

    draws: int
    rows: list[Row] = field(default_factory=list)
    collapses: list[Collapse] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return numbers and names only, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        names = ("site", "estimator", "biased", "relative_sd", "bias", "error", "cosine_to_rloo", "entropy", "distinct")
        table = [names, *(tuple(_cell(getattr(row, name)) for name in names) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines += [f"failed: {row.site} {row.estimator}: {row.failed}" for row in self.rows if row.failed]
        lines += [
            f"suspect: {row.site} {row.estimator}: its mean gradient points in another direction"
            for row in self.rows
            if row.suspect
        ]
        lines += [f"collapsed: {finding}" for finding in self.collapses]
        return "\n".join([*lines, "", _LEGEND, *self._advice()])

    def _advice(self) -> Iterator[str]:
        """Yield one sentence of advice for each site: which estimator to train with."""
        for site in dict.fromkeys(row.site for row in self.rows):
            noisy = (
                all(row.bias is None for row in self.rows if row.site == site) and self.noise.get(site, 0.0) > _NOISY
            )
            if noisy:
                yield f"{site}: the reference gradient is mostly noise, so the estimators cannot be compared. Use more draws or more examples."
                continue
            sound = [row for row in self.rows if row.site == site and row.error is not None and not row.suspect]
            if not sound:
                yield f"{site}: none of these estimators follows the gradient. Check for collapse with find_collapse, and start from a trained soft model."
                continue
            best = min(sound, key=lambda row: row.error or 0.0)
            yield f"{site}: '{best.estimator}' has the smallest error per step, {best.error:.2f}. Compare it with random selection in training."


def _draws(name: str) -> bool:
    """Whether to measure an estimator: not ``soft``, not one that tries every choice (the reference), nor one with a head to train."""
    return name != "soft" and not {"choices", "class"} & set(registry.load("estimators", name).needs)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def diagnose(
    model: nn.Module,
    batch: Mapping[str, Any],
    estimators: Iterable[str | Mapping[str, Any]] | None = None,
    *,
    draws: int = 32,
    limit: int = 256,
    seed: int = 0,
) -> Diagnosis:
    """Measure the gradient of each estimator at each site of a model, on a batch, as it would be in a training step.

    Each site is measured while all others make their deterministic choice, with the same weights and noise for every
    estimator. The model itself is not changed.

    Args:
        model: a model with hard attention.
        batch: keyword inputs with labels; a few examples suffice.
        estimators: names of ``estimators/``, or site overrides such as ``{"estimator": "simple", "estimator_options":
            {"sample": False}, "temperature": 0.5}``; every estimator by default.
        draws: training steps per row, >= 2. limit: largest number of choices to enumerate for the exact gradient.
        seed: of the noise.

    Returns:
        a table; a warning is issued for each collapsed site.

    Raises:
        HardAttentionError: no site to measure, no loss, fewer than 2 draws, or weights that are sharded or offloaded.
    """
    if draws < 2:
        raise HardAttentionError(f"draws={draws} is out of range in diagnose; a variance needs at least 2.")
    model = unwrap(model)
    refuse_other_than_batch(batch, "diagnose")
    refuse_sharded(model, "diagnose")
    refuse_offloaded(model, "diagnose")
    learned = [site for site, selector in selectors(model).items() if selector.learned]
    if not learned:
        raise HardAttentionError(
            f"{type(model).__name__} has no site with a learned scorer; there is no gradient to diagnose. Apply hard attention with scorer 'linear'."
        )
    names = [name for name in registry.names("estimators") if _draws(name)]
    wanted = [
        {"estimator": e} if isinstance(e, str) else dict(e) for e in (names if estimators is None else estimators)
    ]
    result = Diagnosis(draws)
    for site in learned:
        exact = _exact(model, batch, site, limit)
        known = _measure(model, batch, site, _REFERENCE, draws, seed)[0]
        reference = known.mean(0)
        spread = (known - reference).square().sum(-1).mean().sqrt() / draws**0.5
        result.noise[site] = (spread / reference.norm()).item() if reference.norm() > 0 else math.inf
        for changes in wanted:
            row = _row(model, batch, site, changes, draws, seed, exact, reference)
            result.rows.append(replace(row, suspect=_is_suspect(row, result.noise[site])))
    result.collapses = find_collapse(model, batch)
    for finding in result.collapses:
        warnings.warn(str(finding), stacklevel=2)
    return result


def _row(
    model: nn.Module,
    batch: Mapping[str, Any],
    site: str,
    changes: dict[str, Any],
    draws: int,
    seed: int,
    exact: Tensor | None,
    reference: Tensor,
) -> Row:
    name = ", ".join(str(v) for key, value in changes.items() for v in _words(key, value))
    biased = registry.load("estimators", changes["estimator"]).biased
    try:
        gradients, entropy, distinct = _measure(model, batch, site, changes, draws, seed)
    except (HardAttentionError, ImportError) as error:
        return Row(site, name, biased, failed=str(error))
    mean = gradients.mean(0)
    truth = reference if exact is None else exact
    noise = (gradients - mean).square().sum(-1).mean().sqrt()
    return Row(
        site,
        name,
        biased,
        relative_sd=(noise / mean.norm()).item() if mean.norm() > 0 else math.inf,
        bias=None if exact is None else 1 - cosine_similarity(mean, exact, dim=0).item(),
        error=(1 - cosine_similarity(gradients, truth.expand_as(gradients), dim=1)).mean().item(),
        cosine_to_rloo=cosine_similarity(mean, reference, dim=0).item(),
        entropy=entropy,
        distinct=distinct,
    )


def _is_suspect(row: Row, noise: float) -> bool:
    """Whether a mean gradient points in another direction than the reference, if there is a usable one."""
    if row.failed or row.cosine_to_rloo is None:
        return False
    if row.bias is not None:
        return 1 - row.bias < _SUSPECT
    return noise <= _NOISY and row.cosine_to_rloo < _SUSPECT


def _words(key: str, value: Any) -> list[str]:
    if key == "estimator":
        return [str(value)]
    options = value if isinstance(value, Mapping) else {key: value}
    return [f"{name}={option}" for name, option in options.items()]


def _prepared(model: nn.Module, site: str, changes: Mapping[str, Any]) -> tuple[nn.Module, Selector]:
    """Return a copy of the model in training with one live site; dropout is off, since only the estimators' noise is measured."""
    before = selectors(model)
    sites = {name: asdict(selector.config) for name, selector in before.items()}
    sites[site] |= {
        "baseline": "leave_one_out",
        "baseline_options": {"all_ranks": False},  # a process may diagnose by itself
        "estimator_options": {},
        "execution": "auto",
        **({} if before[site].steps else {"anneal": 0}),  # in training, the step's budget; else the final budget
        **changes,
    }
    twin = copy.deepcopy(model)
    restore = (getattr(model.config, "hard_attention", None) or {}).get("restore")
    apply(twin, {"sites": sites, "restore": restore})
    for name, selector in selectors(twin).items():
        selector.scorer.load_state_dict(before[name].scorer.state_dict())
        selector.step, selector.steps = before[name].step or 0, before[name].steps
    twin.eval()
    twin.training = True  # runs the hook of a training pass, but without dropout in the layers
    live = selectors(twin)[site]
    live.train()
    return twin, live


def _measure(
    model: nn.Module, batch: Mapping[str, Any], site: str, changes: Mapping[str, Any], draws: int, seed: int
) -> tuple[Tensor, float | None, float]:
    """Return the gradients ``[draws, P]`` of the site's scorer, the mean entropy, and the mean number of distinct selections."""
    twin, live = _prepared(model, site, changes)
    parameters = list(live.scorer.parameters())
    gradients, masks, entropies = [], [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(draws):
            twin.zero_grad()
            with record(twin) as selections:
                loss = twin(**batch).loss
            if loss is None:
                raise HardAttentionError(
                    f"{type(model).__name__} returned no loss; diagnose needs labels in the batch."
                )
            loss.backward()
            gradients.append(
                torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
            )
            selection = selections[site][0]
            masks.append(selection.mask.detach().flatten(0, -2))
            if selection.entropy is not None:
                entropies.append(selection.entropy.mean().item())
    stacked = torch.stack(masks, 1)  # [rows, draws, N]
    distinct = sum(len(torch.unique(row, dim=0)) for row in stacked) / len(stacked)
    return torch.stack(gradients).double(), sum(entropies) / len(entropies) if entropies else None, distinct


def _exact(model: nn.Module, batch: Mapping[str, Any], site: str, limit: int) -> Tensor | None:
    """Return the gradient of the expected loss, by enumeration; None if there are too many choices."""
    options = {"objective": "expectation", "limit": limit}
    try:
        gradients, _, _ = _measure(model, batch, site, {"estimator": "marginal", "estimator_options": options}, 1, 0)
    except HardAttentionError:
        return None
    return gradients[0]
