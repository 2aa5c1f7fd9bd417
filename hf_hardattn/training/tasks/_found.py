"""Precision and recall of a model's selections on the gold positions."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...modeling.selection import Selection


@dataclass
class Found:
    """Sums over the selections of a test set.

    Attributes:
        one_is_enough: one position of ``gold`` holds the whole answer, so recall is the share of rows that kept any of them.
    """

    one_is_enough: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, selection: Selection, gold: Tensor | None) -> None:
        """Add one selection; ``gold`` as in ``Batch``."""
        self._note("kept", selection.kept_ratio.sum(), selection.kept_ratio.numel())
        if gold is None or gold.shape[-1] != selection.mask.shape[-1]:
            return
        chosen = selection.mask if selection.protected is None else selection.mask & ~selection.protected
        right = chosen & gold[:, None]
        chosen = chosen & gold.any(-1, keepdim=True)[:, None]  # leave out queries without gold, which are padding
        self._note("precision", right.sum(), chosen.sum())
        if self.one_is_enough:
            self._note("recall", right.any(-1).sum(), right[..., 0].numel())
        else:
            self._note("recall", right.sum(), gold[:, None].expand_as(right).sum())

    def metrics(self) -> dict[str, float]:
        """Return the ratios of all selections added so far."""
        return {name: self.sums[name] / max(self.counts[name], 1) for name in self.sums}

    def _note(self, name: str, value: Tensor, count: Tensor | int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.counts[name] = self.counts.get(name, 0.0) + float(count)
