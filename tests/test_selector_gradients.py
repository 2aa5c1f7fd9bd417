"""Gradients of selectors: every parameter has one at each step, since distributed training waits for it, and scores have those of their formula."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn import registry
from hf_hardattn.scorers.linear import Linear

SIZES = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=17, num_labels=3)


@pytest.mark.parametrize("estimator", [name for name in registry.names("estimators") if name != "soft"])
@pytest.mark.parametrize("budget", [0.4, 1.0, {"start": 1.0, "end": 0.4, "steps": 2}], ids=["0.4", "1.0", "schedule"])
@pytest.mark.parametrize("site", ["vision.inputs", "vision.self.1"])
def test_every_selector_parameter_gets_a_gradient(estimator: str, budget: object, site: str) -> None:
    """From the first step on, where a budget of 1.0 leaves nothing to choose."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, **SIZES))
    hf_hardattn.apply(model, {"sites": [site], "budget": budget, "estimator": estimator})
    model.train()
    for step in range(2):
        hf_hardattn.set_step(model, step)
        model(pixel_values=torch.randn(4, 3, 12, 12), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        for name, parameter in model.named_parameters():
            if "selector" in name:
                assert parameter.grad is not None, f"{name} has no gradient at step {step}"
        model.zero_grad()


def test_linear_scores_the_normalised_state() -> None:
    """What stands in its docstring, with its gradients: of padding (a state of zeros), and of states far from unit size."""
    torch.manual_seed(0)
    scorer = Linear(64, 64, heads=2)
    states = torch.randn(2, 5, 64)
    states[0, 1], states[1, 2], states[1, 3] = 0.0, states[1, 2] * 1e-5, states[1, 3] * 1e4
    states.requires_grad_()
    scores = scorer.keys(states, torch.arange(5).expand(2, 5))[..., 0]
    normalised = torch.nn.functional.rms_norm(states, (64,))
    expected = torch.einsum("bnd,hd->bhn", normalised, scorer.weight) + scorer.bias[:, None]
    torch.testing.assert_close(scores, expected)
    inputs = (states, scorer.weight, scorer.bias)
    gradients, wanted = (torch.autograd.grad(made.sin().sum(), inputs) for made in (scores, expected))
    for gradient, formula in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, formula, rtol=1e-4, atol=1e-6)
