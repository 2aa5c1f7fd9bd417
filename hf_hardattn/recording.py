"""Record the selections of a model, or replay given ones."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distributions import ConditionalBernoulli
from .errors import HardAttentionError, unknown
from .modeling.context import Mode, active
from .modeling.selection import Selection
from .modeling.selector import Selector
from .models import family_of
from .modes import named_selectors, selectors_or_refuse, site_names
from .unwrapping import unwrap


def selectors(model: nn.Module) -> dict[str, Selector]:
    """Return the selectors of a model by site name (the active copies, where PEFT keeps several)."""
    return {site: selector for site, selector, runs in named_selectors(model) if runs}


class Recorded(Selection):
    """A recorded selection, whose ``log_prob`` and ``entropy`` are always available; they are computed when read.

    If the estimator sampled from its own distribution (training), they refer to that distribution. Otherwise they refer to the
    distribution that the scores define over all sets of the same size, ``p(S) ~ exp(sum of the scores in S)``, and tell how certain the
    selector was of its choice.
    """

    __slots__ = ("_name",)  # in addition to the attributes shared with the selection

    @classmethod
    def of(cls, selection: Selection, name: str | None = None) -> Recorded:
        """Wrap a selection without copying it, so that attributes its site sets later (``positions``) are visible as well.

        Args:
            name: name of the site in the recorded model; None for the selector's own.
        """
        found = object.__new__(cls)
        found.__dict__ = selection.__dict__
        found._name = selection.site if name is None else name
        return found

    @property
    def site(self) -> str:
        return self._name

    @site.setter
    def site(self, site: str) -> None:
        self._name = site

    @property
    def own(self) -> Selection:
        found = object.__new__(Selection)
        found.__dict__ = self.__dict__
        return found

    @property
    def log_prob(self) -> Tensor:
        """Log-probability of the choice, fp32 ``[B, H, Q]``."""
        known = self.__dict__["log_prob"]
        return self._law().log_prob(self._chosen()) if known is None else known

    @log_prob.setter
    def log_prob(self, value: Tensor | None) -> None:
        self.__dict__["log_prob"] = value

    @property
    def entropy(self) -> Tensor:
        """Entropy of the distribution in nats, fp32 ``[B, H, Q]``."""
        known = self.__dict__["entropy"]
        return self._law().entropy() if known is None else known

    @entropy.setter
    def entropy(self, value: Tensor | None) -> None:
        self.__dict__["entropy"] = value

    def _chosen(self) -> Tensor:
        return self.mask if self.protected is None else self.mask & ~self.protected

    def _law(self) -> ConditionalBernoulli:
        candidates = self.valid if self.protected is None else self.valid & ~self.protected
        chosen = self._chosen()
        scores = self.scores.detach().float().expand(chosen.shape)
        return ConditionalBernoulli(scores, chosen.sum(-1), candidates.expand(chosen.shape))


class Recording(list[Selection]):
    """Selections in the order they were made; ``recording["vision.inputs"]`` gives those of one site.

    Attributes:
        reads: dict from tower name to the tower that its cross-attention reads, or None.
    """

    def __init__(self, selections: Iterable[Selection] = (), reads: Mapping[str, str | None] | None = None):
        super().__init__(selections)
        self.reads = dict(reads or {})

    def append(self, selection: Selection) -> None:
        """Add a selection, as ``Recorded``."""
        self.add(selection)

    def add(self, selection: Selection, site: str | None = None) -> None:
        """Add a selection under the name that its site has in the recorded model; None for the selector's own."""
        super().append(Recorded.of(selection, site))

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = [selection for selection in self if selection.site == key]
        if not found:
            raise unknown("recorded site", key, self.sites)
        return found

    @property
    def sites(self) -> list[str]:
        """Sites in the order of their first selection."""
        return list(dict.fromkeys(selection.site for selection in self))

    def tower(self, site: str) -> str:
        """Return the tower whose input the candidates of ``site`` came from; for ``cross``, the tower that is read."""
        tower, kind, *_ = site.split(".")
        return (self.reads.get(tower) if kind == "cross" else None) or tower

    def kept(self, selection: Selection, *, choice: bool = False) -> Tensor:
        """Return what ``selection`` kept as positions in its tower's input, bool ``[B, H, Q, P]``, whatever earlier sites dropped.

        P is the number of positions in the input: tokens of a text, or CLS and the patches of an image. ``choice=True`` leaves out the
        protected ones (CLS, ``</s>``).
        """
        chosen = selection.mask
        if choice and selection.protected is not None:
            chosen = chosen & ~selection.protected
        return self._as_places(selection, chosen)

    def candidates(self, selection: Selection) -> Tensor:
        """Return the candidates of ``selection`` as positions in its tower's input, bool ``[B, H, Q, P]``."""
        return self._as_places(selection, selection.valid.expand_as(selection.mask))

    def _as_places(self, selection: Selection, chosen: Tensor) -> Tensor:
        stream = self._stream(selection)
        length, positions = selection.mask.shape[-1], selection.positions
        if stream:
            length = stream[0].mask.shape[-1]
            if positions is None and chosen.shape[-1] != length:  # cross-attention to the rows left in the stream
                positions = stream[-1].places[:, 0, 0]
        if positions is None:
            return chosen
        batch = max(chosen.shape[0], positions.shape[0])
        chosen = chosen.expand(batch, -1, -1, -1)
        places = positions.repeat_interleave(batch // positions.shape[0], 0)[:, None, None].expand_as(chosen)
        found = chosen.new_zeros(*chosen.shape[:3], length, dtype=torch.int32)
        return found.scatter_reduce(-1, places, chosen.int(), "amax").bool()

    def _stream(self, selection: Selection) -> list[Selection]:
        """Return the selections that dropped rows of the tower's stream before ``selection``, in the call that ran the tower.

        That is the call of ``selection``. Only cross-attention may read states of an earlier one, such as those of generate()'s encoder.
        """
        index = next(i for i, other in enumerate(self) if other is selection)
        tower = self.tower(selection.site)
        before = [s for s in self[:index] if s.site.startswith((f"{tower}.inputs", f"{tower}.tokens."))]
        reads_another = tower != selection.site.split(".")[0]
        call = before[-1].call if before and reads_another else selection.call
        return [other for other in before if other.call is call]

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per site: calls, mean kept ratio, and mean entropy (nats), see ``Recorded``."""
        rows = []
        for site in self.sites:
            made = self[site]
            known = [s.entropy.float().mean() for s in made if s.entropy is not None]  # one made by hand has none
            rows.append(
                {
                    "site": site,
                    "calls": len(made),
                    "kept_ratio": float(torch.stack([s.kept_ratio.float().mean() for s in made]).mean()),
                    "entropy": float(torch.stack(known).mean()) if known else None,
                }
            )
        return rows

    def __repr__(self) -> str:
        """Show a table of the sites instead of pages of tensors."""
        rows = [("site", "calls", "kept", "entropy (nats)")]
        for row in self.summary():
            entropy = "" if row["entropy"] is None else f"{row['entropy']:.2f}"
            rows.append((row["site"], str(row["calls"]), f"{row['kept_ratio']:.1%}", entropy))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines) if self else "Recording without selections"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(row['site'])}</td><td>{row['calls']}</td><td>{row['kept_ratio']:.1%}</td>"
            f"<td>{'' if row['entropy'] is None else format(row['entropy'], '.2f')}</td></tr>"
            for row in self.summary()
        )
        return f"<table><tr><th>site</th><th>calls</th><th>kept</th><th>entropy (nats)</th></tr>{cells}</table>"


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record every selection that ``model`` makes inside the block, in forward and in generate().

    Only calls of this thread are recorded. A compiled model runs eagerly inside the block.

    Examples:
        >>> with record(model) as selections: model(**batch)        # doctest: +SKIP
        >>> selections["vision.inputs"][0].indices                   # doctest: +SKIP

    Raises:
        HardAttentionError: if the model has no sites.
    """
    inner = unwrap(model)
    names = site_names(inner)
    if not names:
        raise HardAttentionError(
            f"{type(inner).__name__} has no hard-attention sites to record; load it with hard_attention=... or call apply()."
        )
    family = family_of(inner)
    towers = {} if family is None else family.towers(inner)
    recording = Recording(reads={name: tower.source for name, tower in towers.items()})
    with active(Mode(names, recorder=recording)):
        yield recording


@contextmanager
def replay(model: nn.Module, selections: Iterable[Selection] | Mapping[str, Tensor]) -> Iterator[None]:
    """Replay selections: ``model`` keeps the given positions inside the block.

    Args:
        selections: a recording of the same calls, replayed in order at each site; or a dict from site name to a bool mask ``[B, N]`` (or
            ``[B, H, Q, N]``) that is used at every call. Sites that are not named choose as usual.

    Raises:
        HardAttentionError: if the model has no sites or lacks a named one, a mask is not a bool tensor of such a shape, or there are
            fewer selections than calls.
    """
    inner = unwrap(model)
    selectors_or_refuse(inner)
    known = selectors(inner)
    queues: dict[str, Iterator[Tensor]] = {}
    if isinstance(selections, Mapping):
        for site, mask in selections.items():
            queues[site] = itertools.repeat(_four_dimensions(site, mask))
    else:
        masks: dict[str, list[Tensor]] = {}
        for selection in selections:
            masks.setdefault(selection.site, []).append(selection.mask)
        queues = {site: _in_order(site, recorded) for site, recorded in masks.items()}
    for site in queues:
        if site not in known:
            raise unknown("site", site, known, type(inner).__name__)
    with active(Mode(site_names(inner), replayed=queues)):
        yield


def _four_dimensions(site: str, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 4):
        what = f"a tensor of {mask.dtype}, {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise HardAttentionError(
            f"the selection to replay at '{site}' is {what}; pass a bool tensor [B, N] or [B, H, Q, N], True at kept positions."
        )
    return mask[:, None, None, :] if mask.dim() == 2 else mask


def _in_order(site: str, masks: list[Tensor]) -> Iterator[Tensor]:
    yield from masks
    raise HardAttentionError(f"the recording holds fewer selections at '{site}' than the replayed calls need.")
