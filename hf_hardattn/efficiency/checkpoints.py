"""Benchmark of a user's checkpoint: the stock model inside it, and random inputs of a given size for any modality."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..api import remove
from ..budget import final_budget, read_budget
from ..errors import HardAttentionError
from ..inspection.model_with_processor import ModelWithProcessor
from ..modeling import heads
from ..models import family_of
from ..recording import selectors

USUAL_TOKENS, USUAL_PIXELS = 512, 448  # if the configuration names no size


class Facts(NamedTuple):
    """Facts about a checkpoint.

    Attributes:
        hard: its hard attention configuration at the end of its schedules; None for a stock model.
        size: usual input size: pixels per side of an image, frames of audio, or tokens.
        writes: whether its call is ``generate()``.
    """

    hard: dict[str, Any] | None
    size: int
    writes: bool


def facts(place: str, new_tokens: int) -> Facts:
    """Read a checkpoint of any form and family; a decoder reserves positions for ``new_tokens``."""
    model = _load(place)
    hard = getattr(model.config, "hard_attention", None)
    return Facts(None if hard is None else _at_its_end(hard), _usual_size(model, new_tokens), model.can_generate())


def _usual_size(model: Any, new_tokens: int) -> int:
    config = _reader(model.config)
    size = getattr(config, "image_size", None) or getattr(config, "max_source_positions", None)
    if size is not None:
        return max(size) if isinstance(size, (list, tuple)) else size
    if "pixel_values" in _names(model):
        return USUAL_PIXELS
    longest = getattr(config, "max_position_embeddings", None) or 2 * USUAL_TOKENS
    for module in model.modules():  # the positions of RoBERTa start after that of padding
        if isinstance(module, nn.Embedding) and module.num_embeddings == longest and module.padding_idx is not None:
            longest -= module.padding_idx + 1
    prompt = model.can_generate() and not model.config.is_encoder_decoder
    return min(USUAL_TOKENS, longest - new_tokens * prompt)


def _at_its_end(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with its schedules at their final values."""
    ended = {**config, "sites": {site: dict(part) for site, part in config["sites"].items()}}
    for part in (ended, *ended["sites"].values()):
        if "budget" in part:
            part["budget"] = final_budget(read_budget(part["budget"], "budget"))
        for name in ("temperature", "entropy_weight", "exploration"):
            if isinstance(part.get(name), dict) and "end" in part[name]:
                part[name] = part[name]["end"]
    return ended


def stock_model(place: str) -> Any:
    """Return the model of a checkpoint with its saved head and without its hard attention."""
    return remove(_load(place))


def take_trained_selectors(model: Any, place: str) -> Any:
    """Load the selectors of a checkpoint into a model that has the same sites."""
    trained = selectors(_load(place))
    for site, selector in selectors(model).items():
        selector.load_state_dict(trained[site].state_dict())
    return model


def _load(place: str) -> Any:
    try:
        return ModelWithProcessor.load_any(place).model
    except (HardAttentionError, OSError, ValueError) as error:
        raise HardAttentionError(
            f"{place!r} is neither a model of the benchmark (hf-hardattn bench --help names some) nor a checkpoint that can be read: {error}"
        ) from None


def random_inputs(model: Any, place: str, size: int, batch: int) -> dict[str, Any]:
    """Return the inputs of one call: random pixels, tokens or audio. For a model of images and texts, its processor prepares random ones.

    Args:
        model: the result of ``stock_model(place)``. size: pixels per side, frames of audio, or tokens.

    Raises:
        HardAttentionError: a model of images and texts has no processor.
    """
    config, names = _reader(model.config), _names(model)
    captions = model.can_generate() and model.main_input_name == "pixel_values"  # needs only an image
    if {"pixel_values", "input_ids"} <= names and not captions:
        return _through_processor(model, place, size, batch)
    if "spatial_shapes" in names:  # the model takes patches instead of an image
        side = size // config.patch_size
        return {
            "pixel_values": torch.randn(batch, side * side, config.num_channels * config.patch_size**2),
            "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * batch),
        }
    if "pixel_values" in names:
        return {"pixel_values": torch.randn(batch, getattr(config, "num_channels", 3), size, size)}
    if "input_features" in names:
        inputs = {"input_features": torch.randn(batch, config.num_mel_bins, 2 * size)}
    else:
        ids = _tokens(config, batch, size)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in names and not model.can_generate() and not heads.extends(model, _copying_heads(model)):
        inputs["decoder_input_ids"] = torch.full((batch, 1), model.config.decoder_start_token_id)
    return inputs


def _copying_heads(model: Any) -> tuple[str, ...]:
    """Return the heads of the model's family that create their decoder inputs themselves."""
    family = family_of(model)
    return () if family is None else family.spec.copying_heads


def _reader(config: Any) -> Any:
    """Return the configuration of the tower that reads the input first."""
    parts = (getattr(config, name, None) for name in ("vision_config", "encoder", "text_config"))
    return next((part for part in parts if hasattr(part, "model_type")), config)


def _names(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _tokens(config: Any, batch: int, size: int) -> Tensor:
    """Random ids of ordinary tokens ``[batch, size]`` that end in the end-of-text token, which some towers use for pooling."""
    special = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (batch, size))]
    if isinstance(special[-1], int) and special[-1] < config.vocab_size:
        ids[:, -1] = special[-1]
    return ids


def _through_processor(model: Any, place: str, size: int, batch: int) -> dict[str, Any]:
    from PIL import Image

    processor = ModelWithProcessor.load_any(place).processor
    if processor is None:
        raise HardAttentionError(
            f"{place!r} holds no processor, but {type(model).__name__} reads images and texts together, and only its processor can "
            "combine them. Save its processor in the same folder: processor.save_pretrained(...)."
        )
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8)
    text = " ".join(filter(None, [getattr(processor, "image_token", None), "what does this image show"]))
    made = processor(
        images=[Image.fromarray(pixels.numpy())] * batch, text=[text] * batch, return_tensors="pt", padding=True
    )
    return {name: value for name, value in made.items() if name in _names(model) or name == "image_grid_thw"}
