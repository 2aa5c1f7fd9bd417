"""The attention forward of hard models, the same for every family.

It takes effect only if the layer passes an ``AttentionInput``; otherwise the stock forward runs.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .arguments import given, parameter_names
from .attention import AttentionCall
from .pending import attend_pending
from .plan import ATTENTION, AttentionPlan
from .spec import AttentionSpec
from .state import AttentionInput, KeySubset


def install(module: nn.Module, spec: AttentionSpec, layer: int, cross: bool, windows: bool = False) -> None:
    """Replace the forward of an attention module by ``hard_forward``."""
    stock = module.__dict__.get("forward")
    module.__dict__[ATTENTION] = AttentionPlan(spec, parameter_names(module), layer, cross, windows, stock)
    module.__dict__["forward"] = functools.partial(hard_forward, module)


def uninstall(module: Any) -> None:
    """Restore the forward, even if Accelerate has wrapped it in the meantime."""
    plan = module.__dict__.pop(ATTENTION, None)
    if plan is None:
        return
    for name in ("forward", "_old_forward"):
        function = module.__dict__.get(name)
        if isinstance(function, functools.partial) and function.func is hard_forward:
            if plan.stock is not None:
                module.__dict__[name] = plan.stock
            elif name == "forward":
                del module.__dict__[name]
            else:
                module.__dict__[name] = type(module).forward.__get__(module)


def hard_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Attend to the chosen keys; run the stock forward if nothing was chosen."""
    plan: AttentionPlan = module.__dict__[ATTENTION]
    what = given(plan.names, args, kwargs, plan.spec.mask)
    if not isinstance(what, AttentionInput):
        stock = plan.stock
        return type(module).forward(module, *args, **kwargs) if stock is None else stock(*args, **kwargs)
    call = AttentionCall(module, plan, dict(zip(plan.names, args, strict=False)) | kwargs, what)
    if what.pending is not None:
        return call.finish(*attend_pending(call, what.pending, what.gates))
    if what.packing is not None:
        return call.finish(call.attend_rows(what.packing), None)
    return call.finish(*call.attend_keys(what.keys or KeySubset(), what.gates))
