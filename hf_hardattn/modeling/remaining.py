"""What is left of a tower's input after each of its sites, computed from the budgets alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from .family import Tower
from .heads import patch_size
from .selector import Selector

LEAST_SHARE = 0.05  # of the input; several sites are rarely meant to leave less together
# Number of rows from which a layer that reads a quarter of its keys was faster than stock (``bench --suite break_even``, on a CPU),
# by whether layers share a choice. Rows that leave the stream save work in whole layers, which pays from a few dozen rows.
KEYS_PAY_FROM = {False: 128, True: 64}
DROPPING = ("inputs", "tokens")  # kinds whose choices multiply: each chooses among the rows that the previous one left


@dataclass(frozen=True)
class Remaining:
    """The number of rows that are left.

    Attributes:
        share: share of the input, in (0, 1]; None if it depends on the scores.
        rows: number of rows; for texts, whose length differs, an upper bound, or None while only the share is known.
        total: rows of the input; None for texts.
    """

    share: float | None = 1.0
    rows: int | None = None
    total: int | None = None

    def after(self, selector: Selector) -> Remaining:
        """Return what is left after a choice of ``selector``."""
        if selector.keeps_all or self.share is None:
            return self
        if selector.data_dependent:
            return Remaining(None, None, self.total)
        budget, protected = selector.budget(drawing=False), selector.protected.rows
        if self.rows is None:
            if budget.kind == "ratio":
                return replace(self, share=self.share * budget.value)
            return replace(self, rows=int(budget.value) + protected)
        always = min(protected, self.rows)
        rows = always + (budget.slots(self.rows - always) if self.rows > always else 0)
        return Remaining(self.share if self.total is None else rows / self.total, rows, self.total)

    def __str__(self) -> str:
        if self.share is None:
            return "by the scores"
        if self.total is not None:
            return f"{self.rows} of {self.total}"
        return f"{self.share:.3g}" if self.rows is None else f"at most {self.rows}"


def remaining(towers: Mapping[str, Tower], selectors: Mapping[str, Selector]) -> dict[str, Remaining]:
    """Return what is left after each site: rows for ``inputs`` and ``tokens``, and keys that are read for ``self`` and ``cross``."""
    found: dict[str, Remaining] = {}
    ends: dict[str | None, Remaining] = {}
    for tower in sorted(towers.values(), key=lambda tower: tower.source is not None):  # sources before their readers
        left = whole(tower)
        for site, kind in _in_order(tower, selectors):
            source = ends.get(tower.source, Remaining()) if kind == "cross" else left
            found[site] = source.after(selectors[site])
            if kind in DROPPING:
                left = found[site]
        ends[tower.name] = left
    return found


def hardly_meant(towers: Mapping[str, Tower], selectors: Mapping[str, Selector]) -> Iterator[str]:
    """Yield warnings about settings that are probably unintended.

    These are sites that together leave almost nothing, keys that are never read, counts larger than the number of positions, and
    layers that training skips together with their sites.
    """
    left = remaining(towers, selectors)
    for tower in towers.values():
        sites = list(_in_order(tower, selectors))
        rows = [site for site, kind in sites if kind in DROPPING]
        share = left[rows[-1]].share if rows else None
        if len(rows) > 1 and share is not None and share < LEAST_SHARE:
            yield (
                f"{len(rows)} sites of '{tower.name}' together keep only {share:.1%} of its rows, because the budget of '{rows[1]}' is a "
                f"share of the rows that '{rows[0]}' keeps. Use fewer sites, or larger budgets."
            )
        unread = [site for site, kind in sites if kind == "self" and not tower.spec.continues]
        if unread:
            yield (
                f"{', '.join(unread)} select keys for tokens generated after the prompt, but this model generates none, so these sites have "
                "no effect. Use 'inputs' or 'tokens' sites."
            )
        skipped = getattr(tower.module, "layerdrop", 0.0)
        if sites and skipped:
            yield (
                f"{type(tower.module).__name__} skips each layer in {skipped:.0%} of the training steps, and with it the choice at its site "
                f"({sites[0][0]}{', ...' * (len(sites) > 1)}), so that more is kept than in evaluation. Set {tower.spec.name}_layerdrop=0 "
                f"when the model is loaded, or the attribute layerdrop of the {type(tower.module).__name__} to 0."
            )
        total = whole(tower).total
        for site, kind in sites if total is not None else ():
            selector = selectors[site]
            there = (total or 0) - selector.protected.rows
            if kind != "cross" and isinstance(selector.config.budget, int) and selector.config.budget >= there:
                yield (
                    f"budget={selector.config.budget} at '{site}' keeps everything: there are {there} positions to select from. Use a smaller "
                    "count, or a ratio."
                )


def seldom_faster(towers: Mapping[str, Tower], selectors: Mapping[str, Selector]) -> Iterator[str]:
    """Yield notes on the number of rows from which sites that select keys save time, for towers with fewer rows or texts of any length."""
    for tower in towers.values():
        for shared, rows in KEYS_PAY_FROM.items():
            sites = [site for site, kind in _in_order(tower, selectors) if kind == "self" and not tower.spec.prompt]
            sites = [site for site in sites if selectors[site].config.share_selection is shared]
            sites = [site for site in sites if not selectors[site].keeps_all]
            total = whole(tower).total
            if sites and (total is None or total < rows):
                there = "here, texts differ in length" if total is None else f"here there are {total}"
                yield (
                    f"selecting keys ({sites[0]}{', ...' * (len(sites) > 1)}) saved time in our measurements from about {rows} rows on; {there}. "
                    "Shorter inputs run no faster than with full attention. Measure yours with 'hf-hardattn bench --model'."
                )


def mixed_kinds(patterns: Iterable[str], selectors: Iterable[str]) -> Iterator[str]:
    """Yield warnings about globs that name sites of several kinds, except ``"*"``, which clearly means every site."""
    sites = list(selectors)
    for pattern in patterns:
        kinds = sorted({site.split(".")[1] for site in sites if fnmatchcase(site, pattern)})
        if len(kinds) > 1 and pattern != "*":
            yield (
                f"'{pattern}' names sites of {len(kinds)} kinds ({', '.join(kinds)}): rows are dropped at some, and keys at others. Name the kind, as "
                f"in '{pattern.split('.')[0]}.{kinds[-1]}.*', or '*' for everything."
            )


def whole(tower: Tower) -> Remaining:
    """Return the whole input of a tower; for images, the size in its configuration determines the number of rows."""
    size: Any = getattr(tower.config, "image_size", None)
    if not tower.reads_images or size is None:
        return Remaining()
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    patch = patch_size(tower.config)
    rows = tower.protected.first + (height // patch[0]) * (width // patch[1])
    return Remaining(1.0, rows, rows)


def _in_order(tower: Tower, selectors: Mapping[str, Selector]) -> Iterator[tuple[str, str]]:
    """Yield the tower's sites that have a selector, with their kinds, in the order in which a call reaches them."""
    order = ("inputs", "self", "cross", "tokens")
    for site, kind, _ in sorted(tower.sites(), key=lambda site: (site[2], order.index(site[1]))):
        if site in selectors:
            yield site, kind
