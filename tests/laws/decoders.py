"""Tiny decoders, and the stock model as their oracle: it reads everything, and what was dropped is hidden from it by masks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import hf_hardattn

SIZES: dict[str, Any] = dict(
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=29,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DECODERS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma": "Gemma"}
WINDOW = 5  # of Mistral, less than the prompt
STEPS = 6


@functools.cache
def _stock(name: str, head: str, implementation: str) -> Any:
    cls = getattr(transformers, DECODERS[name] + head)
    extra = {"sliding_window": WINDOW} if name == "mistral" else {}
    torch.manual_seed(0)
    model = cls._from_config(cls.config_class(**SIZES, **extra), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


def stock(name: str, head: str = "ForCausalLM", implementation: str = "sdpa") -> Any:
    """A decoder in evaluation mode, with weights large enough for every row to matter."""
    return copy.deepcopy(_stock(name, head, implementation))


def harden(model: nn.Module, config: Any, seed: int = 1) -> Any:
    """Apply ``config``, with selectors whose scores differ clearly between positions."""
    hf_hardattn.apply(model, config)
    torch.manual_seed(seed)
    for selector in hf_hardattn.selectors(model).values():
        for parameter in selector.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def prompts(padded: bool = True) -> dict[str, Tensor]:
    """Two prompts of 12 and 9 tokens, padded on the left."""
    ids = torch.randint(3, 53, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def write(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Greedy generation of ``STEPS`` tokens, with logits."""
    settings = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, disable_compile=True)
    return model.generate(**inputs, **{**settings, **options}, output_logits=True, return_dict_in_generate=True)


def kept(recording: Any) -> dict[str, Tensor]:
    """Site to which positions of the prompt it kept, bool ``[B, N]``."""
    return {site: recording.kept(recording[site][0])[:, 0, 0] for site in recording.sites}


@contextmanager
def hiding(layers: Any, mask: Tensor, chosen: dict[str, Tensor], window: int | None, prompt: int) -> Iterator[None]:
    """Hide from the layers of a stock model, called without a cache, what was dropped in front of each.

    Args:
        mask: of the text ``[B, N]``. chosen: from ``kept``. prompt: its rows; those behind it see the keys that a ``self`` site left.
    """
    n, hooks = mask.shape[1], []
    place = torch.arange(n)
    past = (place[:, None] >= place) & (place[:, None] - place < (window or n))

    def hide(layer: Any, args: Any, kwargs: Any, allowed: Tensor) -> Any:
        if layer.self_attn.config._attn_implementation == "eager":
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": allowed}

    def grown(site: str) -> Tensor:
        everything = torch.ones(len(mask), prompt, dtype=torch.bool)
        return nn.functional.pad(chosen.get(site, everything), (0, n - prompt), value=True)

    rows = mask.bool() & grown("decoder.inputs")
    for index, layer in enumerate(layers):
        allowed = past & rows[:, None, None]
        allowed = allowed & (grown(f"decoder.self.{index}")[:, None, None] | (place < prompt)[:, None])
        allowed = allowed | (torch.eye(n, dtype=torch.bool) & ~allowed.any(-1, keepdim=True))
        hooks.append(layer.register_forward_pre_hook(functools.partial(hide, allowed=allowed), with_kwargs=True))
        rows = rows & grown(f"decoder.tokens.{index}")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def oracle(model: Any, inputs: dict[str, Tensor], chosen: dict[str, Tensor], window: int | None, prompt: int) -> Tensor:
    """Logits ``[B, N, V]`` of the stock model that never sees what was dropped; see ``hiding``."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with hiding(model.model.layers, mask, chosen, window, prompt), torch.no_grad():
        return model(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False).logits


def written_by_oracle(model: Any, inputs: dict[str, Tensor], chosen: dict[str, Tensor], window: int | None) -> Any:
    """What the oracle writes, token by token: the text ``[B, N + STEPS]``, and the logits ``[B, STEPS, V]``."""
    prompt, logits = inputs["input_ids"].shape[1], []
    for _ in range(STEPS):
        logits.append(oracle(model, inputs, chosen, window, prompt)[:, -1])
        logits[-1][:, SIZES["eos_token_id"]] = -torch.inf  # min_new_tokens
        token = logits[-1].argmax(-1, keepdim=True)
        grown = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        inputs = {name: torch.cat((value, grown[name]), 1) for name, value in inputs.items()}
    return inputs["input_ids"], torch.stack(logits, 1)
