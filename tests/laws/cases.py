"""The cases of the contract suite, made from the registered names: every architecture, head, kind of site, scorer and estimator."""

from __future__ import annotations

import functools
import io
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rounding import SOME, assert_rounded
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples import Example, build  # noqa: E402

import hf_hardattn  # noqa: E402
from hf_hardattn import models, registry  # noqa: E402
from hf_hardattn.models import family_of  # noqa: E402

# Families whose attention, masks or heads differ take every scorer with every estimator; those that are another row of names for the
# same code take turns. All families, these and the others, stand the contract of test_families.py.
DISTINCT = ("blip", "gru", "t5", "vit")
ALIKE = ("bert", "siglip")
ONCE = ("CLIPModel", "CLIPTextModelWithProjection", "SiglipModel", "SiglipTextModel")  # heads of that contract alone
THOROUGH = tuple(sorted(DISTINCT + ALIKE))
HEADS = [(name, head) for name in THOROUGH for head in models.load(name).spec.heads if head not in ONCE]
SCORERS, ESTIMATORS, BASELINES = map(registry.names, ("scorers", "estimators", "baselines"))
# one that tries every choice serves ONE site and needs labels, one that learns from classes refuses other labels: test_marginal.py and
# test_cropr.py have their laws
ESTIMATORS = tuple(
    name for name in ESTIMATORS if not {"choices", "class"} & set(registry.load("estimators", name).needs)
)
BUDGETS = (1, 3, 0.5, "threshold:0.5", "top_p:0.6")


@dataclass(frozen=True)
class Place:
    """All sites of one kind in one tower.

    Attributes:
        group: ``tower.kind``. cls: its candidates hold a CLS token that attends.
        grid: its candidates are patches of an image. pixels: its embedding module serves scorers of pixels.
    """

    architecture: str
    group: str
    causal: bool
    cls: bool
    grid: bool = False
    pixels: bool = False
    heads: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.group.split(".")[1]

    @property
    def pattern(self) -> str:
        return self.group if self.kind == "inputs" else f"{self.group}.*"


@dataclass(frozen=True)
class Case:
    """One row of the suite."""

    place: Place
    head: str
    scorer: str = "linear"
    estimator: str = "straight_through"
    budget: Any = 3

    def __str__(self) -> str:
        return f"{self.head}-{self.place.group}-{self.scorer}-{self.estimator}-{self.budget}"

    def config(self, **changes: Any) -> hf_hardattn.HardAttentionConfig:
        fields = dict(
            sites=[self.place.pattern],
            scorer=self.scorer,
            estimator=self.estimator,
            budget=self.budget,
            baseline="leave_one_out",
        )
        return hf_hardattn.HardAttentionConfig(**{**fields, **changes})


class Mould:
    """An object that is copied often. ``copy.deepcopy`` of a model takes as long as a training step of it: five times this."""

    def __init__(self, original: Any):
        self.tensors: list[Tensor] = []
        places: dict[int, int] = {}
        buffer = io.BytesIO()

        class Pickler(pickle.Pickler):
            def persistent_id(_, value: Any) -> int | None:
                if not isinstance(value, Tensor):
                    return None
                if id(value) not in places:
                    places[id(value)] = len(self.tensors)
                    self.tensors.append(value)
                return places[id(value)]

        Pickler(buffer).dump(original)
        self.bytes = buffer.getvalue()

    def cast(self) -> Any:
        """A copy; what was one tensor in two places is one again."""
        made = [
            nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else tensor.clone()
            for tensor in self.tensors
        ]
        unpickler = pickle.Unpickler(io.BytesIO(self.bytes))
        unpickler.persistent_load = made.__getitem__
        return unpickler.load()


@functools.cache
def _mould(architecture: str, head: str, changes: tuple[tuple[str, Any], ...]) -> Mould:
    return Mould(_stock(architecture, head, changes))


@functools.cache
def _stock(architecture: str, head: str, changes: tuple[tuple[str, Any], ...]) -> Example:
    torch.manual_seed(0)
    example = build(architecture, head, **dict(changes))
    with torch.no_grad():  # initial weights are so small that no output depends on what is selected
        for parameter in example.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return example


def stock(architecture: str, head: str, padded: bool = True, **changes: Any) -> Example:
    """The tiny example of a head, in evaluation mode, with weights large enough for selections to matter."""
    example = _mould(architecture, head, tuple(changes.items())).cast()
    if not padded and "attention_mask" in example.batch:
        example.batch["attention_mask"] = torch.ones_like(example.batch["attention_mask"])
    return Example(example.model.eval(), example.batch)


def harden(model: nn.Module, config: Any, seed: int = 1) -> nn.Module:
    """Apply ``config``, with selectors whose scores differ clearly between positions."""
    hf_hardattn.apply(model, config)
    torch.manual_seed(seed)
    for selector in hf_hardattn.selectors(model).values():
        for parameter in selector.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def hard(case: Case, padded: bool = True, **changes: Any) -> Example:
    """The example of a case with its sites in place."""
    example = stock(case.place.architecture, case.head, padded)
    harden(example.model, case.config(**changes))
    return example


def tensors(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of an output by name, caches left out."""
    if isinstance(output, Tensor):
        return {prefix: output}
    if hasattr(output, "items"):
        named: Any = output.items()
    elif isinstance(output, (tuple, list)):
        named = enumerate(output)
    else:
        return {}
    found: dict[str, Tensor] = {}
    for name, value in named:
        if name != "past_key_values":
            found |= tensors(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def run(example: Example, **kwargs: Any) -> dict[str, Tensor]:
    """The outputs of the example's model on its batch, without gradient."""
    with torch.no_grad():
        return tensors(example.model(**{**example.batch, **kwargs}))


def close(found: dict[str, Tensor], expected: dict[str, Tensor], units: float = SOME) -> None:
    """Assert the same outputs: names, shapes and values; 80 units of fp32 are law 1's 1e-5, and 0 asks for the same bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_rounded(found[name], value, units, name)


def train_loss(example: Example, seed: int = 3) -> Tensor:
    """The loss of a training step, or a stand-in of the same kind (with the estimators' terms) for heads that return none."""
    model = example.model.train()
    torch.manual_seed(seed)
    if has_loss(example):
        return model(**example.batch).loss
    with hf_hardattn.record(model) as selections:
        found = {name: value for name, value in tensors(model(**example.batch)).items() if value.is_floating_point()}
    per_row = sum(value.flatten(1).square().mean(1) for value in found.values())
    extra = hf_hardattn.auxiliary_loss(selections, hf_hardattn.selectors(model), -per_row.detach())
    return per_row.mean() if extra is None else per_row.mean() + extra


def has_loss(example: Example) -> bool:
    """Whether the head returns a loss for the example's batch."""
    return bool({"labels", "start_positions", "return_loss", "bool_masked_pos"} & example.batch.keys())


def can_generate(architecture: str, head: str) -> bool:
    return (
        hasattr(_stock(architecture, head, ()).model, "generate")
        and _stock(architecture, head, ()).model.can_generate()
    )


def all_sites(model: nn.Module) -> dict[str, str]:
    """Site name to kind."""
    towers = family_of(model).towers(model)
    return {site: kind for tower in towers.values() for site, kind, _ in tower.sites()}


def has_kind(architecture: str, head: str, kind: str) -> bool:
    """Whether the head has sites of a kind."""
    return kind in all_sites(_stock(architecture, head, ()).model).values()


def _places() -> list[Place]:
    found: dict[Place, list[str]] = {}
    for architecture, head in HEADS:
        model = _stock(architecture, head, ()).model
        for name, tower in models.load(architecture).towers(model).items():
            for kind in tower.kinds:
                causal = tower.causal and kind == "self"
                cls = tower.protected.first > 0 and kind != "cross" and not tower.causal
                facts = tower.reads_images, tower.has_patches
                found.setdefault(Place(architecture, f"{name}.{kind}", causal, cls, *facts), []).append(head)
    return [replace(place, heads=tuple(heads)) for place, heads in found.items()]


PLACES = _places()


def refusal(place: Place, scorer: str) -> str | None:
    """The message with which the library refuses a scorer at a place, as a pattern; None where it serves it."""
    member = registry.load("scorers", scorer)
    if member.needs_cls and not place.cls:
        return f"scorer '{scorer}' reads a CLS token; there is none among the candidates of '{place.group}"
    if member.needs_grid and not (place.grid and place.kind == "inputs"):
        return f"scorer '{scorer}' reads a whole grid of patches; '{place.group}.*' has none"
    if member.needs_pixels and not (place.pixels and place.kind == "inputs"):
        return f"scorer '{scorer}' reads the pixels of an image; '{place.group}"
    if member.per_query and place.kind in ("tokens", "inputs"):
        return f"scorer '{scorer}' selects per query; '{place.group}.*' drops whole tokens, with one selection per row"
    if member.sequential and place.causal:
        return f"scorer '{scorer}' makes one selection per row, glimpse by glimpse; at '{place.group}.*' each query selects"
    return None


def mismatch(scorer: str, other: Any) -> bool:
    """Whether the library refuses a scorer with an estimator, or with a budget."""
    if not registry.load("scorers", scorer).sequential:
        return False
    if isinstance(other, str) and other in ESTIMATORS:
        estimator = registry.load("estimators", other)
        counts = estimator.exact_budget or other == "soft"
        return not counts or bool({"teacher", "choices", "target", "class"} & set(estimator.needs))
    return isinstance(other, str)  # threshold and top-p budgets


def pairwise(factors: Sequence[Sequence[Any]], allowed: Callable[[Any, Any], bool]) -> Iterator[tuple[Any, ...]]:
    """Rows in which every allowed pair of values of two factors occurs at least once; greedy and deterministic."""
    values = [(f, v) for f, factor in enumerate(factors) for v in range(len(factor))]

    def fits(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return allowed(factors[a[0]][a[1]], factors[b[0]][b[1]])

    uncovered = {(a, b) for a, b in itertools.combinations(values, 2) if a[0] < b[0] and fits(a, b)}
    while uncovered:
        row = list(min(uncovered))
        for f in range(len(factors)):
            if all(f != taken for taken, _ in row):
                options = [
                    (f, v) for v in range(len(factors[f])) if all(fits(*sorted(((f, v), other))) for other in row)
                ]
                row.append(max(options, key=lambda o: (sum(tuple(sorted((o, r))) in uncovered for r in row), -o[1])))
        row.sort()
        uncovered -= set(itertools.combinations(row, 2))
        yield tuple(factors[f][v] for f, v in row)


def cases(
    scorers: Sequence[str] = SCORERS,
    estimators: Sequence[str] = ("straight_through",),
    budgets: Sequence[Any] = BUDGETS,
    where: Callable[[Place], bool] = lambda place: True,
) -> list[Case]:
    """Pairwise cover of place, scorer, estimator and budget; the heads of a place take turns.

    The places of families that are alike take two rows each, in which scorers, estimators and budgets take turns.
    """

    def allowed(a: Any, b: Any) -> bool:
        if a in scorers:
            return not mismatch(a, b)
        return not isinstance(a, Place) or b not in SCORERS or b not in scorers or refusal(a, b) is None

    turn = {place: itertools.cycle(place.heads) for place in PLACES}

    def head(place: Place, row: Sequence[Any]) -> str:
        """The place's next head that serves the row: one that averages the rows needs as many in every example."""
        found = next(turn[place])
        averages = found in models.load(place.architecture).spec.averaging_heads and place.kind in ("inputs", "tokens")
        while averages and any(isinstance(value, str) and ":" in value for value in row):
            found = next(turn[place])
            averages = found in models.load(place.architecture).spec.averaging_heads
        return found

    places = [place for place in PLACES if where(place)]
    served = [scorer for scorer in scorers if any(refusal(place, scorer) is None for place in places)]
    distinct = [place for place in places if place.architecture in DISTINCT]
    rows = [*pairwise([distinct, served, estimators, budgets], allowed)] if distinct else []
    turns = [itertools.cycle(values) for values in (served, estimators, budgets)]
    for place in [place for place in places if place.architecture in ALIKE for _ in range(2)]:
        row = (place, *map(next, turns))
        while not all(allowed(*pair) for pair in itertools.combinations(row, 2)):
            row = (place, next(turns[0]), *row[2:])
        rows.append(row)
    return [Case(place, head(place, rest), *rest) for place, *rest in rows]


def averages(head: str, place: Place) -> bool:
    """Whether a head averages the rows that a place drops, which takes a fixed budget."""
    return head in models.load(place.architecture).spec.averaging_heads and place.kind in ("inputs", "tokens")


def head_places(where: Callable[[Place], bool] = lambda place: True) -> list[tuple[str, Place]]:
    """Every head with every place it has."""
    return [(head, place) for place in PLACES if where(place) for head in place.heads]
