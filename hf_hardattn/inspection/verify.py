"""Check on a batch of the user that masked and gathered execution agree, and how dropped positions can still affect the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..modeling.context import without_modes
from ..modeling.plan import FOLLOWS
from ..models import family_of
from ..modes import evaluating, execution
from ..recording import Recording, record, replay, selectors
from ..unwrapping import refuse_other_than_batch, unwrap

REPLACEMENTS = ("noise", "zero", "swap")
REPLACED = "they are replaced by noise, by a constant or by their neighbours"


@dataclass
class SiteReport:
    """How the positions that were dropped at one site can affect the output, given the selection.

    Attributes:
        site: its name.
        kept_ratio: mean kept share of the valid candidates; 1.0 if the site chose nothing.
        leak: largest change of any output over all replacements of the dropped positions; None if it was not measured.
        certified: whether something was dropped, and the outputs stayed bit-identical under every replacement of it.
        statement: the same as a sentence.
        overlap: Jaccard index of the positions kept before and after the dropped ones were replaced, if the site is free to choose
            again, in [0, 1]; the lowest over all replacements, mean over rows; None if it was not measured.
        answers_changed: share of the batch's rows whose answer, the largest logit, then changes; None without logits.
    """

    site: str
    kept_ratio: float
    leak: float | None
    certified: bool
    statement: str
    overlap: float | None = None
    answers_changed: float | None = None

    @property
    def end_to_end(self) -> str | None:
        """A sentence on how the choice changes with the content of dropped positions, which the scorer reads; None if not measured."""
        if self.overlap is None:
            return None
        answers = "" if self.answers_changed is None else f", and {self.answers_changed:.1%} of the answers change"
        return (
            f"{self.site}: when the model selects again after such a replacement, which no certificate covers, the old and the new "
            f"selection overlap by {self.overlap:.2f} (Jaccard){answers}"
        )


@dataclass
class Report:
    """The outcome of ``verify``; ``print(report)`` shows it.

    Attributes:
        parity: largest difference between masked and gathered outputs.
        parity_ok: whether it is at most the tolerance.
        sites: one report per site.
    """

    parity: float
    parity_ok: bool
    sites: list[SiteReport] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = "agree" if self.parity_ok else "DISAGREE"
        return "\n".join(
            [
                f"masked and gathered outputs {verdict} (largest difference {self.parity:.2g})",
                *(line for s in self.sites for line in (s.statement, s.end_to_end) if line is not None),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for cards."""
        return asdict(self)


@torch.no_grad()
def verify(model: nn.Module, batch: Mapping[str, Any], *, tolerance: float = 1e-4, seed: int = 0) -> Report:
    """Check a hard model on a batch.

    1. Parity: masked and gathered execution give the same outputs.
    2. Certificate: every input token or patch that a site dropped is replaced by noise, by a constant and by its neighbour, while the
       selection is held fixed. At ``inputs`` sites the outputs, apart from the loss (a target may be the image itself), must stay
       bit-identical. At other sites the leak is measured: earlier layers and the residual stream may have carried the dropped content on.
    3. End to end: the scorer read the dropped positions before it chose. If the selection is free to change, how many other positions
       are kept, and how many answers change?

    A site is not measured if it dropped nothing, or if replacing all its candidates changes nothing: the batch then gives the result of
    the tower (``encoder_outputs``), or the output does not depend on it.

    Args:
        model: hard model. It runs in evaluation mode and gathered, whatever blocks (``soft``, ``sampled``, ``execution`` ...) are around
            the call; all modes are restored afterwards.
        batch: keyword inputs of its forward.
        tolerance: of parity, absolute.
        seed: of the noise.

    Raises:
        HardAttentionError: no sites; a row that is all padding; a cache in the batch; an output without names. A failure of parity or of a
            certificate is reported and NOT raised.
    """
    model = unwrap(model)
    refuse_other_than_batch(batch, "verify")
    family = family_of(model)
    if family is None or not selectors(model):
        raise HardAttentionError(
            f"{type(model).__name__} has no hard-attention sites to verify; load it with hard_attention=... or call apply()."
        )
    _check_batch(batch)
    with without_modes(), evaluating(model), execution(model, "gathered"):
        with record(model) as selections, _noting_runs(family.towers(model)) as ran:
            gathered = _tensors(model(**batch))
        with execution(model, "masked"):
            masked = _tensors(model(**batch))
        parity = _difference(gathered, masked)
        given = {tower: rows for tower, rows in family.input_rows(model, batch).items() if tower in ran}
        trial = _Trial(model, family, dict(batch), selections, given, seed)
        sites = [trial.report(site) for site in dict.fromkeys([*selections.sites, *selectors(model)])]
    return Report(parity, parity <= tolerance, sites)


def _check_batch(batch: Mapping[str, Any]) -> None:
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask.any(-1).all()):
        row = int((~mask.bool().any(-1)).nonzero()[0])
        raise HardAttentionError(
            f"row {row} of attention_mask is all padding; a budget needs at least one valid position in each row. Drop the row."
        )
    if batch.get("past_key_values") is not None:
        raise HardAttentionError(
            "the batch of verify holds past_key_values; every call adds to a cache, and verify makes several. Give the whole input."
        )


@contextmanager
def _noting_runs(towers: Mapping[str, Any]) -> Iterator[set[str]]:
    """Yield a set of the names of the towers that run inside the block."""
    ran: set[str] = set()
    hooks = [
        tower.module.register_forward_pre_hook(lambda *_, name=name: ran.add(name)) for name, tower in towers.items()
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Trial:
    """What the sites of one model are measured with.

    Attributes:
        selections: of one pass over ``batch``. given: towers that read an input in that pass, with its rows, bool ``[B, N]``.
    """

    model: nn.Module
    family: Any
    batch: dict[str, Any]
    selections: Recording
    given: dict[str, Tensor]
    seed: int

    def report(self, site: str) -> SiteReport:
        """Return the report of one site."""
        if site not in self.selections.sites:
            return _unmeasured(site, 1.0, "because it chose nothing in this batch")
        made, tower = self.selections[site][0], self.selections.tower(site)
        kept_ratio = float(torch.stack([s.kept_ratio.float().mean() for s in self.selections[site]]).mean())
        if tower not in self.given:
            return _unmeasured(site, kept_ratio, "because its candidates are computed, not read from the batch")
        rows = self.given[tower]
        candidates, kept, chosen = (
            places.expand(len(rows), -1, -1, -1).flatten(1, 2).any(1) & rows
            for places in (
                self.selections.candidates(made),
                self.selections.kept(made),
                self.selections.kept(made, choice=True),
            )
        )
        dropped = candidates & ~kept
        if not bool(dropped.any()):
            why = (
                "it dropped nothing in this batch"
                if kept_ratio == 1.0
                else "each position is kept by some query or head"
            )
            return _unmeasured(site, kept_ratio, f"because {why}")
        # Nothing is replaced, but the tensors are written in the same way: a different memory layout can change a convolution's last bits.
        reference = self.replayed(self.replaced(tower, torch.zeros_like(dropped), "zero"))
        if _difference(reference, self.replayed(self.replaced(tower, dropped | chosen, "noise"))) == 0.0:
            return _unmeasured(
                site, kept_ratio, f"because the input of '{tower}' did not reach the output in this batch"
            )
        return self.measure(site, tower, dropped, kept_ratio, reference)

    def measure(
        self, site: str, tower: str, dropped: Tensor, kept_ratio: float, reference: Mapping[str, Tensor]
    ) -> SiteReport:
        """Return the report of a site that dropped ``dropped``, bool ``[B, N]``, of its tower's input."""
        leak, rows = 0.0, torch.zeros(len(dropped), dtype=torch.bool)
        overlap, answers = 1.0, None
        for how in REPLACEMENTS:
            changed = self.replaced(tower, dropped, how)
            output = self.replayed(changed)
            leak = max(leak, _difference(reference, output))
            rows |= _changed_rows(reference, output, len(dropped))
            with record(self.model) as again:
                free = _tensors(self.model(**changed))
            overlap = min(overlap, _overlap(self.selections, again, site))
            answers = _most(answers, _changed_answers(reference, free, len(dropped)))
        kind = site.split(".")[1]
        if leak == 0.0:
            finding = (
                "cannot influence the output" if kind == "inputs" else "did not influence the output in this batch"
            )
            verdict = f"{finding}: it is bit-identical when {REPLACED}"
        elif kind == "inputs":
            verdict = f"LEAK: they change the output by {leak:.2g}, which is a bug"
        else:
            through = _channel(site, tower, _shared(self.model, self.family, site))
            verdict = f"still change the output by up to {leak:.2g} in {int(rows.sum())} of {len(rows)} rows, through {through}"
        sentence = f"{site}: keeps {kept_ratio:.1%}. Given this selection, the {int(dropped.sum())} dropped positions {verdict}"
        return SiteReport(site, kept_ratio, leak, leak == 0.0, sentence, overlap, answers)

    def replaced(self, tower: str, places: Tensor, how: str) -> dict[str, Any]:
        """Return the batch with these places of a tower's input replaced."""
        found: dict[str, Any] = self.family.replace_inputs(self.model, self.batch, {tower: places}, how, self.seed)
        return found

    def replayed(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the outputs, apart from the loss, under the recorded selections."""
        with replay(self.model, self.selections):
            output = _tensors(self.model(**batch))
        return {name: value for name, value in output.items() if name != "loss"}


def _unmeasured(site: str, kept_ratio: float, why: str) -> SiteReport:
    return SiteReport(site, kept_ratio, None, False, f"{site}: keeps {kept_ratio:.1%}; not measured, {why}")


def _overlap(selections: Recording, again: Recording, site: str) -> float:
    """Return the mean Jaccard index of two choices at a site, without protected positions."""
    one, other = (kept.kept(kept[site][0], choice=True) for kept in (selections, again))
    shared, either = (one & other).sum(-1), (one | other).sum(-1)
    return float((shared / either.clamp(min=1)).where(either > 0, 1.0).mean())


def _changed_answers(one: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: int) -> float | None:
    """Return the share of the batch's rows in which the largest logit changes; None without logits of several classes."""
    found = [
        (value.argmax(-1) != other[name].argmax(-1)).reshape(batch, -1).any(-1)
        for name, value in one.items()
        if "logits" in name and value.shape[-1] > 1 and len(value) == batch and value.shape == other[name].shape
    ]
    return float(torch.stack(found).any(0).float().mean()) if found else None


def _most(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else max(one, other)


def _channel(site: str, tower: str, shared: bool) -> str:
    """Describe what carries dropped content past a site: earlier layers that mixed it into kept rows, the residual stream, and
    attention that does not share the site's choice."""
    _, kind, number = site.split(".")
    layer = int(number)
    if kind == "tokens":
        return f"earlier layers ({_layers(layer)} mixed it into the kept tokens)"
    if kind == "cross":
        others = "" if shared else " and the other layers' cross-attention"
        return f"the {tower}'s layers (they mixed it into the kept rows){others}"
    mixed = "" if layer == 0 else f"earlier layers ({_layers(layer - 1)} mixed it into the kept tokens) and "
    return f"{mixed}the residual stream (its own row goes on{'' if shared else ', and later layers read it'})"


def _shared(model: nn.Module, family: Any, site: str) -> bool:
    """Whether all other attention that could read what a ``self`` or ``cross`` site dropped shares its choice."""
    name, kind, number = site.split(".")
    owner = family.towers(model)[name]
    readers = [
        owner.host(kind, layer)[0]
        for _, other, layer in owner.sites()
        if other == kind and (layer > int(number) or kind == "cross" and layer != int(number))
    ]
    return all(module.__dict__.get(FOLLOWS) == site for module in readers)


def _layers(last: int) -> str:
    return "layer 0" if last == 0 else f"layers 0 to {last}"


def _tensors(output: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors among the model's outputs, by name."""
    if not isinstance(output, Mapping):
        raise HardAttentionError(
            f"the model returned a {type(output).__name__}; verify compares outputs by their names. Leave out return_dict=False."
        )
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference; it is infinite if shapes or finiteness differ, and 0.0 only if bit-identical."""
    largest = 0.0
    for name, value in one.items():
        if value.shape != other[name].shape:
            return float("inf")
        if not torch.equal(value, other[name]):
            largest = max(largest, float((value - other[name]).abs().nan_to_num(float("inf")).max()), 1e-45)
    return largest


def _changed_rows(one: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: int) -> Tensor:
    """Return the rows of the batch in which any output changed, bool ``[batch]``; all rows if the shape of an output changed."""
    found = torch.zeros(batch, dtype=torch.bool)
    for name, value in one.items():
        if value.shape == other[name].shape and value.dim() and len(value) == batch:
            found |= (value != other[name]).flatten(1).any(1).cpu() if value.dim() > 1 else (value != other[name]).cpu()
        elif value.shape != other[name].shape:
            found |= True
    return found
