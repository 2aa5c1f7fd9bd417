"""The ends of every range: a model at the smallest and largest legal number trains, and nothing of it is NaN or infinite."""

from __future__ import annotations

import pytest
import torch
from hub_server.models import stock

import hf_hardattn
from hf_hardattn import HardAttentionError, registry
from hf_hardattn.fields import PROBABILITY, TEMPERATURE, WEIGHT
from hf_hardattn.options import option_rules

KINDS = {"scorer": "scorers", "estimator": "estimators", "baseline": "baselines"}
SITES = {"conv": "vision.inputs", "scout": "vision.inputs", "query_key": "vision.self.0", "attention": "vision.self.0"}
# Legal on a model that has room for it; here it would take gigabytes, or a thousand forward passes a step.
TOO_LARGE = {("recurrent", "size"), ("perturbed", "draws"), ("gumbel_rao", "draws"), ("rloo", "samples"), ("grpo", "samples"), ("sfess", "samples")}  # fmt: skip


def ends():
    """Every option with a range, at both ends."""
    for kind, folder in KINDS.items():
        for name in registry.names(folder):
            for option, rule in option_rules(registry.load(folder, name)).items():
                if rule.range is None:
                    continue
                low, high = rule.range.low, rule.range.high
                values = [low] if (name, option) in TOO_LARGE else [low, high if not rule.range.open_high else 0.999999]
                for value in values:
                    yield pytest.param(kind, name, {option: value}, id=f"{name}-{option}-{value:g}")


def train(changes):
    """Two steps of training; return the model, or None where the site cannot take this option, said in a clear error."""
    torch.manual_seed(0)
    model = stock()
    site = SITES.get(changes.get("scorer", "linear"), "vision.tokens.0")
    size = model.config.image_size
    batch = {"pixel_values": torch.randn(2, model.config.num_channels, size, size), "labels": torch.tensor([0, 1])}
    try:
        hf_hardattn.apply(model, {"sites": [site], "budget": 2, **changes}).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    except HardAttentionError:
        return None
    assert loss.isfinite()
    return model


def assert_finite(model):
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("kind", "name", "options"), ends())
def test_option_at_the_end_of_its_range(kind, name, options):
    changes = {kind: name, f"{kind}_options": options}
    if kind == "baseline":
        changes["estimator"] = "reinforce"
    model = train(changes)
    assert model is not None or name in ("conv", "scout", "marginal"), "this model can have any of these options"
    if model is not None:
        assert_finite(model)


@pytest.mark.parametrize("estimator", registry.names("estimators"))
@pytest.mark.parametrize("temperature", [TEMPERATURE.low, TEMPERATURE.high])
@pytest.mark.parametrize("backward", [TEMPERATURE.low, TEMPERATURE.high])
def test_temperature_at_the_end_of_its_range(estimator, temperature, backward):
    model = train({"estimator": estimator, "temperature": temperature, "backward_temperature": backward})
    if model is not None:
        assert_finite(model)


@pytest.mark.parametrize("estimator", ["simple", "reinforce", "variational"])
@pytest.mark.parametrize("field", ["exploration", "entropy_weight", "score_function_weight", "self_distillation"])
def test_field_at_the_end_of_its_range(field, estimator):
    high = PROBABILITY.high if field == "exploration" else WEIGHT.high
    for value in (0, high):
        model = train({"estimator": estimator, field: value})
        assert model is not None
        assert_finite(model)
