"""Choices that are made inside an attention, from the states that it receives."""

from __future__ import annotations

from torch import Tensor

from .attention import AttentionCall
from .cross import choose_source_keys
from .implementations import refuse_per_query
from .keys import choose_keys
from .queries import attend_per_query
from .selector import running
from .state import KeySubset, PendingChoice


def attend_pending(call: AttentionCall, pending: PendingChoice, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Choose the keys of a call, then attend to them.

    Args:
        gates: ``[B, N]``, from masked training at earlier sites.

    Returns:
        ``[B, Q, H * d]``, and weights ``[B, H, Q, N]`` if requested.
    """
    selector = running(call.module.selector)
    if not selector.once:
        refuse_per_query(
            call.implementation, call.plan.spec, selector.site
        )  # it may have changed since the model was attached
    if not selector.once and (call.plan.cross or call.cache is not None):
        # the features of earlier keys are in the cache, or the queries are computed inside the layer
        return attend_per_query(call, selector, pending.context, gates)
    call.query  # noqa: B018  # projected before the choice: gradients are then summed in a fixed order
    plan, context, state = pending.plan, pending.context, pending.state
    if call.plan.cross:
        cache = call.given.get("past_key_values")
        keys = choose_source_keys(selector, plan, context, state, call.view, call.source, call.mask, cache)
        return call.attend_keys(keys or KeySubset(), gates)
    keys = choose_keys(selector, plan, context, state, call.view, call.hidden, call.mask, call.bias)
    return call.attend_keys(keys or KeySubset(), gates)
