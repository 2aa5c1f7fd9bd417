"""The estimator ``cropr``: its auxiliary head, which alone teaches the scorer, and which no saved model holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import harden, stock
from safetensors.torch import load_file
from torch.nn import functional
from transformers import ViTForImageClassification

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.training.stock_trainer import every_weight

SITES = ["vision.inputs"]


def vit(**config):
    example = stock("vit", "ViTForImageClassification")
    harden(example.model, {"sites": SITES, "scorer": "mlp", "budget": 3, "estimator": "cropr", **config})
    example.model.train()
    return example


def heads(model):
    return [name for name, _ in model.named_parameters() if ".head." in name]


def test_loss_is_the_tasks_and_the_heads():
    """The head reads each candidate by how often the law of the scores keeps it, here by enumeration."""
    example = vit(estimator_options={"weight": 0.7})
    (selector,) = hf_hardattn.selectors(example.model).values()
    seen = []
    handle = selector.head.register_forward_hook(lambda head, args, kwargs, out: seen.append(args[0]), with_kwargs=True)
    with hf_hardattn.record(example.model) as selections:
        output = example.model(**example.batch)
    handle.remove()
    scores, labels, losses = selections[0].scores[:, 0, 0, 1:], example.batch["labels"], []
    for row, values in enumerate(seen[0][:, 1:]):  # CLS is no candidate
        subsets = list(itertools.combinations(range(scores.shape[1]), 3))
        chances = torch.stack([scores[row, list(subset)].sum() for subset in subsets]).softmax(0)
        read = sum(p * values[list(subset)].mean(0) for p, subset in zip(chances, subsets, strict=True))
        read = functional.rms_norm(read, read.shape)
        logits = selector.head.class_weight @ read + selector.head.class_bias
        losses.append(functional.cross_entropy(logits, labels[row]))
    task = functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(output.loss, task + 0.7 * torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_the_head_alone_teaches_the_scorer_and_nothing_else():
    gradients = {}
    for weight in (0.0, 50.0):
        model = (example := vit(estimator_options={"weight": weight})).model
        with hf_hardattn.record(model) as selections:
            model(**example.batch).loss.backward()
        assert selections[0].gates is None and not selections[0].masked and selections[0].slots == 4
        gradients[weight] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, none in gradients[0.0].items():
        if "selector" in name:
            assert none.abs().max() == 0 and gradients[50.0][name].abs().max() > 0, name
        elif none is not None:
            torch.testing.assert_close(none, gradients[50.0][name])


def test_saved_models_hold_no_head(tmp_path):
    example = vit()
    model = example.model.eval()
    assert len(heads(model)) == 5
    model.save_pretrained(tmp_path / "stock")
    hf_hardattn.save(model, tmp_path / "ours")
    for place in ("stock", "ours"):
        tensors = load_file(tmp_path / place / "model.safetensors")
        assert any("selector.scorer" in name for name in tensors) and not any("head." in name for name in tensors)
    with torch.no_grad():
        expected = model(**example.batch).logits
        loaded = ViTForImageClassification.from_pretrained(tmp_path / "stock")
        assert torch.equal(loaded(**example.batch).logits, expected)
        assert torch.equal(hf_hardattn.load(tmp_path / "ours")(**example.batch).logits, expected)
    loaded.train()(**example.batch).loss.backward()  # a fresh head is there to go on with
    with every_weight(loaded):  # so does the Trainer resume
        loaded.load_state_dict(load_file(tmp_path / "stock" / "model.safetensors"), strict=False)
    hf_hardattn.remove(loaded)
    assert not heads(loaded) and not loaded._keys_to_ignore_on_save


def test_what_it_cannot_learn_from_is_refused():
    with pytest.raises(
        HardAttentionError, match=r"reads pixels, .* at 'vision.inputs'; the head of estimator 'cropr' reads"
    ):
        vit(scorer="scout")
    example = vit()
    with pytest.raises(
        HardAttentionError, match="given no labels in training; estimator 'cropr' at 'vision.inputs' learns"
    ):
        example.model(pixel_values=example.batch["pixel_values"])
    example = stock("t5", "T5ForConditionalGeneration")
    harden(example.model, {"sites": ["encoder.inputs"], "estimator": "cropr"})
    with pytest.raises(
        HardAttentionError, match=r"labels of shape \(\d+, \d+\) and torch.int64 in training; .* one integer label"
    ):
        example.model.train()(**example.batch)
