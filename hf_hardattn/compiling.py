"""Compile a hard model in one call, in the mode that is fastest on its device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .errors import HardAttentionError, unknown
from .models import family_of
from .recording import selectors
from .unwrapping import refuse_offloaded, refuse_sharded, unwrap

MODES = ("packed", "cuda_graphs", "default", "eager")

Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model, batch: Mapping[str, Any] | None = None, *, mode: str | None = None) -> Model:  # noqa: A001
    """Compile a model for inference in place.

    The model keeps its class, so that saving, ``status`` and every other function work as before. A forward inside ``record``, ``soft``,
    ``sampled`` or ``replay`` runs eagerly. Each new batch shape is compiled once; numbers of kept positions that depend on the scores are
    compiled as dynamic sizes.

    Mode ``"packed"`` lays out the weights in advance only for calls without gradients, inside ``torch.inference_mode()`` or
    ``torch.no_grad()``, as ``generate()`` makes them.

    Models with ``generate()`` get a static cache, and an encoder is compiled as well as the decoder. If a model supports no static cache,
    such as BLIP, only its vision tower is compiled.

    Args:
        model: a hard or an original model, in evaluation mode.
        batch: keyword inputs of one call. The model is run on it twice, so that it is compiled before your first call. None: your first
            calls compile it.
        mode: ``"packed"`` lets Inductor lay out the weights for the processor in advance, which takes their memory a second time;
            ``"cuda_graphs"`` replays kernels without the host; ``"default"`` is plain Inductor; ``"eager"`` undoes an earlier call. None
            selects ``"packed"`` on a CPU and ``"cuda_graphs"`` on a GPU, or ``"default"`` on a GPU if the number of kept positions
            depends on the scores, since a graph cannot wait for that number.

    Returns:
        ``model``.

    Raises:
        HardAttentionError: if the mode is unknown, the model is in training mode, or its weights are sharded or offloaded.
    """
    inner: Any = unwrap(model)
    if mode is not None and mode not in MODES:
        raise unknown("mode", mode, MODES)
    parts = _parts(inner)
    part: Any
    for part in parts:
        part._compiled_call_impl = None
    if mode == "eager":
        return model
    _refuse(inner)
    if not parts:
        raise HardAttentionError(
            f"no part of {type(inner).__name__} can be compiled: generate() has no static cache for it, and it has no vision tower. Run it uncompiled."
        )
    mode = mode or fastest(inner)
    for part in parts:
        part.compile(**_options(inner, mode))
        part._compiled_call_impl = CompiledCall(part._compiled_call_impl, mode)
    if inner in parts and _generates(inner):
        inner.generation_config.cache_implementation = "static"
    for _ in range(2 if batch is not None else 0):
        _call(inner, batch or {})
    return model


class CompiledCall:
    """The call of a compiled module, with the settings that its mode needs whenever a new shape is compiled.

    Args:
        function: the compiled call. mode: one of ``MODES``.
    """

    def __init__(self, function: Callable[..., Any], mode: str):
        self.function, self.mode = function, mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode != "packed":
            output = self.function(*args, **kwargs)
            # the next replay overwrites the memory of this output
            return tree_map_only(Tensor, torch.clone, output) if self.mode == "cuda_graphs" else output
        from torch._inductor import config as inductor  # only if something is compiled

        # not among torch.compile's options, because Dynamo must read it too, to treat the weights as constants
        with inductor.patch(freezing=True):
            return self.function(*args, **kwargs)


def _refuse(model: nn.Module) -> None:
    if model.training:
        raise HardAttentionError(
            f"{type(model).__name__} is in training mode; hf_hardattn.compile is for inference. Call model.eval() first, or use "
            "torch.compile(model) to train."
        )
    refuse_sharded(model, "hf_hardattn.compile")
    refuse_offloaded(model, "hf_hardattn.compile")


def fastest(model: nn.Module) -> str:
    """Return the fastest mode on the device of a model."""
    if _device(model) != "cuda":
        return "packed"
    asking = [site for site, selector in selectors(model).items() if selector.data_dependent or selector.config.pack]
    if not asking:
        return "cuda_graphs"
    warnings.warn(
        f"compiled without CUDA graphs: at {', '.join(asking)} the scores decide how many positions are kept, and a graph cannot wait for "
        "that number. Use a count or a ratio as the budget of these sites.",
        stacklevel=3,
    )
    return "default"


def _options(model: nn.Module, mode: str) -> dict[str, Any]:
    asks = any(selector.data_dependent or selector.config.pack for selector in selectors(model).values())
    options: dict[str, Any] = {"dynamic": None if asks else False}
    return options | ({"mode": "reduce-overhead"} if mode == "cuda_graphs" else {})


def _generates(model: Any) -> bool:
    return hasattr(model, "generate") and model.can_generate()


def _parts(model: Any) -> list[nn.Module]:
    """Return the modules to compile: those that the model, or its ``generate()``, calls."""
    if not _generates(model):
        return [model]
    if getattr(model, "_can_compile_fullgraph", False):
        return [model.get_encoder(), model] if model.config.is_encoder_decoder else [model]
    family = family_of(model)
    towers = family.towers(model).values() if family is not None else ()
    return [tower.module for tower in towers if tower.reads_images]


def _call(model: Any, batch: Mapping[str, Any]) -> None:
    with torch.inference_mode():
        model.generate(**batch, max_new_tokens=2) if _generates(model) else model(**batch)


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type
