"""What selectors add to the training loss, in words, and the warning that it has no effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from .selector import Selector


def terms_of(selectors: Iterable[Selector], self_distillation: Any) -> tuple[str, ...]:
    """Return what these selectors and the option ``self_distillation`` add to the training loss, in words; empty if nothing."""
    found = [term for selector in selectors for term in selector.terms]
    return tuple(dict.fromkeys([*found, "self_distillation"] if self_distillation else found))


def warn_of_lost_terms(why: str, terms: Iterable[str], remedy: str) -> None:
    """Warn that terms of the training loss have no effect. ``why`` begins the sentence, and ``remedy`` is a sentence."""
    warnings.warn(
        f"{why}, so this has no effect: {', '.join(terms)}. {remedy} Rewards, penalties and the entropy bonus can also be added to a loss "
        "of your own: with hf_hardattn.record(model) as selections, call hf_hardattn.auxiliary_loss(selections, "
        "hf_hardattn.selectors(model), reward).",
        stacklevel=3,
    )
