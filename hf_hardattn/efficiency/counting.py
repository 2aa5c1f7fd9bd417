"""Counted cost: floating-point operations of matrix products from shapes, and the elements written by all other operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..api import set_step
from ..modeling.selector import Selector
from ..modes import evaluating

# part of each matrix product: mm and addmm multiply activations by weights, bmm multiplies activations
PARTS = {"mm": "linear", "addmm": "linear", "bmm": "attention", "baddbmm": "attention", "convolution": "convolution"}


def count_training_flops(model: nn.Module, batch: Mapping[str, Any], steps: int, points: int = 8) -> int:
    """Count the FLOPs of ``steps`` training steps on batches like this one: forward and backward, matrix products only.

    A budget schedule changes the cost of a gathered step, so the function counts steps spread over the training and takes their mean.
    Weights, gradients and the state of the random number generators are unchanged.

    Args:
        batch: inputs with ``labels``. steps: steps of the training, >= 1. points: number of steps that are counted.
    """
    training, kept = model.training, [(p, p.grad) for p in model.parameters()]
    chosen = sorted({round(step) for step in torch.linspace(0, steps - 1, points).tolist()})
    model.train()
    for parameter, _ in kept:
        parameter.grad = None
    counted = 0
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            for step in chosen:
                set_step(model, step, steps)
                counted += sum(flops_by_part(lambda: model(**batch).loss.backward()).values())
    finally:
        model.train(training)
        for parameter, gradient in kept:
            parameter.grad = gradient
    return counted * steps // len(chosen)


@torch.no_grad()
def count_flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Count the FLOPs executed by one forward of ``model`` in evaluation mode (two per multiply-add, matrix products only).

    Attention uses the math backend while it is counted, because PyTorch's counter does not see the fused CPU kernel.
    Masked execution shows no saving here, because it saves nothing; gathered execution shows its saving.
    """
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation == "flex_attention":  # it is one operation without a count; the products are those of SDPA
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    try:
        with evaluating(model):
            return sum(flops_by_part(lambda: model(**batch)).values())
    finally:
        if implementation == "flex_attention":
            model.set_attn_implementation(implementation)  # type: ignore[operator]


def flops_by_part(call: Callable[[], object]) -> dict[str, int]:
    """Count the FLOPs of ``call`` by part: ``linear``, ``attention``, ``convolution``."""
    with sdpa_kernel(SDPBackend.MATH), ProductCounter() as counter:
        call()
    return counter.parts


class ProductCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products by part, by PyTorch's own formulas.

    ``FlopCounterMode`` also follows modules through autograd, which fails for models that make views of their inputs without gradient.

    Attributes:
        parts: maps ``linear``, ``attention`` and ``convolution`` to the FLOPs counted so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = dict.fromkeys(PARTS.values(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            # a fused product that has no name of its own here is one of attention
            part = PARTS.get(func.overloadpacket.__name__, "attention")
            self.parts[part] += formula(*args, **(kwargs or {}), out_val=output)
        return output


class ElementCounter(TorchDispatchMode):
    """Counts the elements written by norms, activations, copies and gathers, but not by views and matrix products. The output of
    selectors is not counted either: it is the price of a saving, not a part of the remaining work.

    Args:
        least_rows: products with weights that have fewer rows cost as much as with this number, because reading the weights dominates.

    Attributes:
        elements: number counted so far. linear: FLOPs of products with weights, at the cost of at least ``least_rows`` rows.
    """

    def __init__(self, least_rows: float = 1.0) -> None:
        super().__init__()
        self.least_rows = least_rows
        self.elements = 0
        self.linear = 0.0
        self.choosing = False

    def __enter__(self) -> ElementCounter:
        self._methods = {name: getattr(Selector, name) for name in ("keys", "forward")}
        for name, method in self._methods.items():
            setattr(Selector, name, self._free(method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.items():
            setattr(Selector, name, method)

    def _free(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.choosing = True
            try:
                return method(*args, **kwargs)
            finally:
                self.choosing = False

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        output = func(*args, **(kwargs or {}))
        if PARTS.get(name) == "linear" and not self.choosing:
            (rows, inner), (_, columns) = (t.shape for t in args[-2:])
            self.linear += 2 * max(rows, self.least_rows) * inner * columns
        if not self.choosing and not func.is_view and name not in PARTS and "scaled_dot_product" not in name:
            self.elements += sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        return output


def work(call: Callable[[], object], *, fake: bool = True, least_rows: float = 1.0) -> dict[str, Any]:
    """Return the work of ``call`` by part: FLOPs of ``linear``, ``attention`` and ``convolution``, written elements of ``other``; and
    ``streamed``, the FLOPs of ``linear`` at the cost of at least ``least_rows`` rows (see ``limits.streaming_rows``).

    Args:
        fake: trace only shapes, without computing. ``generate()`` and packed rows depend on values and must compute.
    """
    with torch.no_grad():
        if not fake:
            parts = flops_by_part(call)
            with ElementCounter(least_rows) as counter:
                call()
        else:
            with FakeTensorMode(allow_non_fake_inputs=True):
                parts = flops_by_part(call)
            with FakeTensorMode(allow_non_fake_inputs=True), ElementCounter(least_rows) as counter:
                call()
    return {**parts, "other": counter.elements, "streamed": counter.linear}
