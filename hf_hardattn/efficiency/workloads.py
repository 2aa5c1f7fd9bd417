"""Workloads of the benchmark: a model of a given shape, its input, and the timed call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipVisionConfig,
    BlipVisionModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import BaseModelOutput

from ..compiling import compile
from ..devices import default_device
from ..errors import unknown
from .checkpoints import random_inputs, stock_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """One model at one size.

    Attributes:
        model: ``vit``, ``t5_encoder``, ``t5_decode`` (cross-attention over given encoder states), ``blip_vision``, ``blip_caption``,
            all of the base size with random weights; or the location of a checkpoint of any family.
        size: pixels per side, or source tokens.
        batch: examples per call. shortest: length of the shortest row relative to ``size``, in (0, 1]; the other lengths are evenly
            spaced, and the rows are padded (encoder of T5).
        dtype: ``float32`` | ``bfloat16`` | ``float16``.
        layers: layers of each tower (12 in the base size).
        new_tokens: tokens generated per call of ``generate()``; 0 for a forward pass.
    """

    model: str
    size: int
    batch: int = 1
    dtype: str = "float32"
    layers: int = 12
    new_tokens: int = 0
    shortest: float = 1.0

    @property
    def generates(self) -> bool:
        """Whether the call is ``generate()``."""
        return self.new_tokens > 0

    def build(self) -> nn.Module:
        """Build the stock model on the default device, in evaluation mode, with the same weights at every call."""
        torch.manual_seed(0)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        build = MODELS.get(self.model)
        model = build(self) if build else stock_model(self.model)
        return model.to(default_device(), DTYPES[self.dtype]).eval()

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Return the keyword inputs of one call, the same each time."""
        torch.manual_seed(1)
        place = next(model.parameters())
        if self.model not in MODELS:
            made = random_inputs(model, self.model, self.size, self.batch)
            return {
                name: value.to(place if value.is_floating_point() else place.device) for name, value in made.items()
            }
        if self.model == "t5_decode":
            states = torch.randn(self.batch, self.size, model.config.d_model).to(place)  # type: ignore[union-attr, arg-type]
            return {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        if self.model == "t5_encoder":
            ids = torch.randint(2, 32000, (self.batch, self.size), device=place.device)
            if self.shortest == 1.0:
                return {"input_ids": ids}
            lengths = torch.linspace(self.size, self.shortest * self.size, self.batch, device=place.device).round()
            mask = (torch.arange(self.size, device=place.device) < lengths[:, None]).long()
            return {"input_ids": ids * mask, "attention_mask": mask}
        return {"pixel_values": torch.randn(self.batch, 3, self.size, self.size).to(place)}

    def call(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        """Run the timed call; ``options`` are passed to ``generate()``."""
        with torch.inference_mode():
            return self.run(model, inputs, **options)

    def run(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        """Like ``call``, but in the caller's gradient mode: in inference mode, counters see composite operations as one."""
        if not self.generates:
            return model(**inputs)
        length = dict(max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens)
        return model.generate(**inputs, **length, **options, do_sample=False, return_dict_in_generate=True)  # type: ignore[operator]

    def compiled(self, model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
        """Return ``call`` compiled by ``hf_hardattn.compile`` and warmed up."""
        from torch._dynamo import config as dynamo  # imported only for compilation

        call = partial(self.call, compile(share_weights(model)), inputs)
        # every model of a run counts as one more compilation of the same code
        with dynamo.patch(recompile_limit=1_000, accumulated_recompile_limit=1_000):
            for _ in range(2):
                call()
        return call


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its parameters and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def cache_bytes(output: Any) -> int | None:
    """Return the bytes of the cross-attention cache after ``generate()``; None if there is none."""
    cache = getattr(getattr(output, "past_key_values", None), "cross_attention_cache", None)
    if cache is None:
        return None
    # the last layers are empty if the decoder has fewer layers than the encoder
    held: list[Tensor] = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in held)


def _vit(w: Workload) -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=w.size, num_hidden_layers=w.layers))


def _t5(w: Workload) -> T5Config:
    sizes: dict[str, Any] = dict(
        decoder_start_token_id=0,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=w.layers,
        num_decoder_layers=w.layers,
        num_heads=12,
    )
    return T5Config(**sizes)


def _blip_vision(w: Workload) -> dict[str, Any]:
    return dict(image_size=w.size, num_hidden_layers=w.layers, initializer_range=0.02)


def _blip(w: Workload) -> nn.Module:
    text = dict(num_hidden_layers=w.layers, initializer_range=0.02)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_blip_vision(w)))


MODELS: dict[str, Callable[[Workload], nn.Module]] = {
    "vit": _vit,
    "t5_encoder": lambda w: T5EncoderModel(_t5(w)),
    "t5_decode": lambda w: T5ForConditionalGeneration(_t5(w)),
    "blip_vision": lambda w: BlipVisionModel(BlipVisionConfig(**_blip_vision(w))),
    "blip_caption": _blip,
}
WRITERS = ("t5_decode", "blip_caption")  # their call is generate()
