"""Attention implementations of Transformers: their known properties, and a family's eager function."""

from __future__ import annotations

from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import HardAttentionError
from .rotary import family_function
from .spec import AttentionSpec


def is_softmax(implementation: str) -> bool:
    """Return whether an implementation is known to compute softmax attention, so that it may be computed in another way."""
    return implementation in ("eager", "sdpa", "flex_attention") or implementation.startswith("flash_attention")


def refuse_per_query(implementation: str, spec: AttentionSpec, site: str) -> None:
    """Refuse per-query choices with an attention function that is not known to accept a per-query mask.

    Raises:
        HardAttentionError: if the implementation cannot serve the site.
    """
    if implementation in ("eager", "sdpa") or not spec.interface:
        return
    known = implementation in ALL_ATTENTION_FUNCTIONS.valid_keys()
    what = f"attn_implementation='{implementation}'" if known else f"the registered attention '{implementation}'"
    raise HardAttentionError(
        f"{what} at '{site}', where each query chooses its own keys; such a choice is made on softmax attention with a mask of each "
        "query. Use attn_implementation='sdpa' or 'eager', or a scorer that makes one choice for all queries."
    )


def stock_eager(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the eager attention function of a module's family."""
    return family_function(module, "eager_attention_forward")(module, *args, **kwargs)
