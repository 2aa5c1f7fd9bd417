"""``hf_hardattn.compile``: the same outputs, the settings of its mode, and every other function works as before."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from examples import build

import hf_hardattn
from hf_hardattn import HardAttentionError, compiling

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds with g++")


def hard(architecture, head, **config):
    example = build(architecture, head)
    hf_hardattn.apply(example.model.eval(), config)
    return example


@needs_compiler
def test_a_compiled_model_says_the_same_and_stays_what_it_was(tmp_path):
    example = hard("vit", "ViTForImageClassification", sites={"vision.tokens.0": {"budget": 3}})
    model, batch = example.model, {"pixel_values": example.batch["pixel_values"]}
    with torch.inference_mode():
        expected = model(**batch).logits
        keys = list(model.state_dict())
        assert hf_hardattn.compile(model, batch) is model
        torch.testing.assert_close(model(**batch).logits, expected)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(**batch)
    packed = ("_mkl_linear", "_linear_pointwise")
    assert any(name in event.key for event in profiler.key_averages() for name in packed)
    assert list(model.state_dict()) == keys
    with hf_hardattn.record(model) as selections, torch.inference_mode():
        model(**batch)
    assert [selection.site for selection in selections] == ["vision.tokens.0"]
    copied = copy.deepcopy(model)
    assert copied._compiled_call_impl is None
    model.save_pretrained(tmp_path)
    hf_hardattn.compile(model, mode="eager")
    assert model._compiled_call_impl is None


def calls(model, batch, monkeypatch):
    """The modules whose compiled call a ``generate()`` makes, by class."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    whole = compiling.CompiledCall.__call__
    monkeypatch.setattr(
        compiling.CompiledCall,
        "__call__",
        lambda self, *args, **kwargs: (made.append(self.function.__self__), whole(self, *args, **kwargs))[1],
    )
    hf_hardattn.compile(model, mode="default")
    written = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return written, {type(module).__name__ for module in made}


def test_generate_runs_the_compiled_encoder_and_decoder_with_a_static_cache(monkeypatch):
    example = hard("t5", "T5ForConditionalGeneration", sites={"encoder.tokens.0": {"budget": 3}})
    batch = {name: example.batch[name] for name in ("input_ids", "attention_mask")}
    expected = example.model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    written, made = calls(example.model, batch, monkeypatch)
    assert torch.equal(written, expected)
    assert made == {"T5Stack", "T5ForConditionalGeneration"}
    assert example.model.generation_config.cache_implementation == "static"


def test_of_a_model_without_a_static_cache_the_vision_tower_is_compiled(monkeypatch):
    example = hard("blip", "BlipForConditionalGeneration", sites={"vision.tokens.0": {"budget": 3}})
    batch = {"pixel_values": example.batch["pixel_values"]}
    expected = example.model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    written, made = calls(example.model, batch, monkeypatch)
    assert torch.equal(written, expected)
    assert made == {"BlipVisionModel"}


def test_what_cannot_be_compiled_is_refused():
    example = hard("vit", "ViTForImageClassification", sites=["vision.inputs"], budget=3)
    with pytest.raises(HardAttentionError, match="is in training mode"):
        hf_hardattn.compile(example.model.train())
    with pytest.raises(HardAttentionError, match="Did you mean 'packed'"):
        hf_hardattn.compile(example.model.eval(), mode="pack")
    gru = hard("gru", "GruForConditionalGeneration", sites=["decoder.cross.*"], budget=1)
    with pytest.raises(HardAttentionError, match="no part of GruForConditionalGeneration can be compiled"):
        hf_hardattn.compile(gru.model)


@pytest.mark.parametrize(("budget", "mode"), [(3, "cuda_graphs"), ("threshold:0.5", "default")])
def test_on_a_gpu_only_fixed_counts_become_graphs(monkeypatch, budget, mode):
    example = hard("vit", "ViTForImageClassification", sites=["vision.inputs"], budget=budget)
    monkeypatch.setattr(compiling, "_device", lambda model: "cuda")
    if mode == "default":
        with pytest.warns(UserWarning, match="without CUDA graphs: at vision.inputs the scores decide"):
            assert compiling.fastest(example.model) == mode
    else:
        assert compiling.fastest(example.model) == mode


def test_outputs_of_a_graph_outlive_its_next_replay():
    memory = torch.zeros(2)
    call = compiling.CompiledCall(lambda x: {"logits": memory.copy_(x)}, "cuda_graphs")
    first = call(torch.ones(2))
    call(torch.full((2,), 7.0))
    assert first["logits"].tolist() == [1.0, 1.0]
