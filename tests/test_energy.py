"""Counted training FLOPs, and the meter of energy."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn.efficiency.counting import count_flops, count_training_flops
from hf_hardattn.efficiency.energy import metered, total


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=12, patch_size=4
    )
    return ViTForImageClassification(config)


@pytest.fixture
def batch():
    return {"pixel_values": torch.randn(3, 3, 12, 12), "labels": torch.tensor([0, 1, 1])}


def test_training_flops(model, batch):
    """A backward costs two matrix products for each of the forward, but none for the input's own gradient."""
    forward = count_flops(model, batch)
    counted = count_training_flops(model, batch, 10)
    assert 2.5 * 10 * forward < counted < 3 * 10 * forward
    assert count_training_flops(model, batch, 1000) == 100 * counted


def test_counting_leaves_everything_as_it_was(model, batch):
    hf_hardattn.apply(model, {"sites": ["vision.inputs"], "budget": {"start": 1.0, "end": 0.4, "steps": 5}})
    model(**batch).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    count_training_flops(model.eval(), batch, 10)
    assert torch.equal(torch.rand(4), expected) and not model.training
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))


def test_a_budget_that_falls_makes_gathered_steps_cheaper(model, batch):
    hard = {"sites": ["vision.inputs"], "estimator": "reinforce"}
    hf_hardattn.apply(model, {**hard, "budget": 1.0})
    dear = count_training_flops(model, batch, 10)
    hf_hardattn.apply(model, {**hard, "budget": 2})
    cheap = count_training_flops(model, batch, 10)
    hf_hardattn.apply(model, {**hard, "budget": {"start": 1.0, "end": 0.2, "steps": 9}})
    assert cheap < count_training_flops(model, batch, 10) < dear


def test_the_meter_reads_the_machine(capfd):
    logging.getLogger("codecarbon").setLevel(logging.INFO)  # as its import leaves it
    with metered() as found:
        torch.randn(900, 900).matmul(torch.randn(900, 900))
    assert "codecarbon" not in capfd.readouterr().err
    assert found["kwh"] > 0 and found["co2_grams"] == pytest.approx(475 * found["kwh"])
    assert "estimated" in found["how"] and found["scope"].startswith("whole machine") and "475" in found["region"]
    both = total([found, found])
    assert both["kwh"] == 2 * found["kwh"] and both["software"] == found["software"]


def test_without_codecarbon_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with metered() as found:
        pass
    assert found == {"not_measured": "codecarbon is not installed (pip install 'hf-hardattn[energy]')"}
    assert total([{"kwh": 1.0, "co2_grams": 2.0}, found]) == found
    with pytest.raises(ZeroDivisionError), metered():
        raise ZeroDivisionError
