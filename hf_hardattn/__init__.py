"""Token selection (hard attention) for pretrained Hugging Face Transformers.

Importing the package registers it with Transformers. A model changes only if its configuration contains ``hard_attention``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import sample
from .api import (
    apply,
    freeze_backbone,
    remove,
    set_budget,
    set_reward,
    set_step,
    status,
)
from .compiling import compile
from .config import HardAttentionConfig, SiteConfig
from .errors import HardAttentionError
from .inspection.collapse import Collapse, find_collapse
from .inspection.diagnosis import Diagnosis, diagnose
from .inspection.verify import Report, verify
from .integrations.transformers import register as _patch_transformers
from .losses.score_function import auxiliary_loss
from .modeling.selection import Selection
from .modes import execution, sampled, soft
from .recording import Recording, record, replay, selectors
from .registry import register
from .version import __version__

if TYPE_CHECKING:
    from .hub.loading import load
    from .hub.pushing import push
    from .hub.saving import save
    from .training.callback import HardAttentionCallback

__all__ = [
    "Collapse",
    "Diagnosis",
    "HardAttentionCallback",
    "HardAttentionConfig",
    "HardAttentionError",
    "Recording",
    "Report",
    "Selection",
    "SiteConfig",
    "__version__",
    "apply",
    "auxiliary_loss",
    "compile",
    "diagnose",
    "execution",
    "find_collapse",
    "freeze_backbone",
    "load",
    "push",
    "record",
    "register",
    "remove",
    "replay",
    "sample",
    "sampled",
    "save",
    "selectors",
    "set_budget",
    "set_reward",
    "set_step",
    "soft",
    "status",
    "verify",
]

_patch_transformers()


# Imported on first use: importing the Trainer takes seconds, and not everyone trains or publishes a model.
_LAZY = {
    "HardAttentionCallback": "training.callback",
    "load": "hub.loading",
    "push": "hub.pushing",
    "save": "hub.saving",
}


_LAZY_MODULES = ("efficiency", "inspection", "metrics")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, including those that are imported on first use."""
    return sorted([*__all__, *_LAZY_MODULES])
