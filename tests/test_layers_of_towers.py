"""Layers that the user puts into a hard tower: they work, or are refused by name, before they compute on what was dropped."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers.models.vit.modeling_vit import ViTLayer

import hf_hardattn
from hf_hardattn import HardAttentionError

sys.path.insert(0, str(Path(__file__).parent))
from examples import Example, build  # noqa: E402


class StrictLayer(ViTLayer):
    """Without ``**kwargs``."""

    def forward(self, hidden_states: Any, attention_mask: Any = None) -> Any:
        return super().forward(hidden_states, attention_mask)


def hard_vit(sites: Any = ("vision.tokens.0",), **fields: Any) -> Example:
    torch.manual_seed(0)
    example = build("vit", "ViTForImageClassification")
    hf_hardattn.apply(example.model, {"sites": list(sites), "budget": 4, **fields})
    return example


def run(example: Example) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = example.model.eval()(**example.batch).logits
    return logits


def replace(example: Example, number: int, layer: type = ViTLayer) -> None:
    fresh = layer(example.model.config)
    fresh.load_state_dict(example.model.vit.layers[number].state_dict(), strict=False)
    example.model.vit.layers[number] = fresh


def test_a_layer_with_a_strict_signature_is_refused_when_attached() -> None:
    example = build("vit", "ViTForImageClassification")
    replace(example, 2, StrictLayer)
    before = run(example)
    with pytest.raises(
        HardAttentionError,
        match="layer 2 of 'vision' is a StrictLayer, whose forward accepts no extra keyword arguments",
    ):
        hf_hardattn.apply(example.model, {"sites": ["vision.tokens.0"]})
    assert torch.equal(run(example), before) and "no hard attention" in hf_hardattn.status(example.model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", [0, 2])
def test_a_layer_that_came_later_is_refused_until_hard_attention_is_applied_again(number: int, training: bool) -> None:
    """Behind a site it would ignore the gates of masked training; in its place the site would be gone, and the model soft."""
    example = hard_vit()
    replace(example, number)
    with pytest.raises(
        HardAttentionError, match=f"layer {number} of 'vision' .ViTLayer. was added after hard attention was applied"
    ):
        example.model.train(training)(**example.batch)
    hf_hardattn.apply(example.model, example.model.config.hard_attention)
    with hf_hardattn.record(example.model) as selections:
        run(example)
    assert selections.sites == ["vision.tokens.0"]


def test_lists_of_known_layers_are_no_obstacle() -> None:
    example = hard_vit()
    layers = example.model.vit.layers
    example.model.vit.layers = nn.ModuleList([*layers[:2]])
    shallow = run(example)
    assert torch.equal(run(Example(copy.deepcopy(example.model), example.batch)), shallow)
    hf_hardattn.remove(example.model)
    assert not any(name.startswith("hard_attention") for part in example.model.modules() for name in vars(part))


def test_the_mask_of_a_layer_with_a_site_says_what_it_is() -> None:
    example, seen = hard_vit(["vision.self.1"]), []
    hook = lambda layer, args, kwargs: seen.extend([*args, *kwargs.values()])  # noqa: E731
    example.model.vit.layers[1].attention.register_forward_pre_hook(hook, with_kwargs=True)
    run(example)
    (mask,) = [value for value in seen if type(value).__name__ == "AttentionInput"]
    assert mask.mask is None
    with pytest.raises(
        AttributeError, match="no 'shape': it also carries the selection. The mask itself is its attribute 'mask'"
    ):
        mask.shape  # noqa: B018


def test_choices_of_each_query_are_not_drawn_anew_in_the_backward_pass() -> None:
    example = build("t5", "T5ForConditionalGeneration")
    hf_hardattn.apply(example.model, {"sites": ["decoder.self.0"], "estimator": "rloo", "budget": 2})
    example.model.train().gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with pytest.raises(
        HardAttentionError, match="'decoder.self.0' selects for each query.*Leave preserve_rng_state at True"
    ):
        example.model(**example.batch, use_cache=False)


def test_offloaded_estimators_train_or_are_refused() -> None:
    example = hard_vit(estimator="hard_concrete")
    accelerate.cpu_offload(example.model.train())
    assert example.model(**example.batch).loss.isfinite()
    example = hard_vit(estimator="variational")
    accelerate.cpu_offload(example.model.train())
    with pytest.raises(
        HardAttentionError, match="is offloaded, and so not in memory between calls; estimator 'variational' reads"
    ):
        example.model(**example.batch)
