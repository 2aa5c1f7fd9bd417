"""Hard attention for Hugging Face Transformers: PEFT for where a model looks.

Importing the package registers it; models are untouched until a config carries ``hard_attention``.
"""

from typing import TYPE_CHECKING, Any

from .config import HardAttentionConfig, SiteConfig
from .errors import HardAttentionError
from .losses import auxiliary_loss
from .patching import register
from .recording import Recording, record, replay, selectors
from .registration import apply, execution, freeze_backbone, remove, set_reward, set_step, soft, status
from .selection import Selection
from .verify import Report, verify

if TYPE_CHECKING:
    from .training.callback import HardAttentionCallback

__version__ = "0.1.0"

__all__ = [
    "HardAttentionCallback",
    "HardAttentionConfig",
    "HardAttentionError",
    "Recording",
    "Report",
    "Selection",
    "SiteConfig",
    "apply",
    "auxiliary_loss",
    "execution",
    "freeze_backbone",
    "record",
    "remove",
    "replay",
    "selectors",
    "set_reward",
    "set_step",
    "soft",
    "status",
    "verify",
]

register()


def __getattr__(name: str) -> Any:
    if name == "HardAttentionCallback":  # importing the Trainer takes seconds, and not everybody trains
        from .training.callback import HardAttentionCallback

        return HardAttentionCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
