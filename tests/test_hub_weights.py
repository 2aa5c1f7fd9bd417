"""What `load` asks of weights: the base that the selectors were trained on, finite numbers of a kind that models have."""

from __future__ import annotations

import inspect
import json
import logging as python_logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from examples import build
from hub_server.models import answer, harden, same, stock, with_adapter
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

import hf_hardattn
from hf_hardattn import models
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.hub.fingerprints import fingerprint, fingerprint_of_format_1

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOT_THE_BASE = "are not those that the selectors of .* were trained on"


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()


BASES = {"vit": (stock, None), "t5": (t5, {"sites": ["encoder.tokens.0"], "budget": 0.5})}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved_selectors(folder: Path, family: str, dtype: torch.dtype, loaded: bool = True) -> Path:
    """Selectors on a base in ``folder/base``, saved while the base was in ``dtype``."""
    make, config = BASES[family]
    base = make()
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base", dtype=dtype) if loaded else base.to(dtype)
    return hf_hardattn.save(
        harden(base, config), folder / "selectors", selectors_only=True, base_model=str(folder / "base")
    )


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
@pytest.mark.parametrize("loaded", [True, False], ids=["from_pretrained", "to"])
def test_the_base_is_known_in_every_dtype(
    tmp_path: Path, loaded: bool, saved: torch.dtype, wanted: torch.dtype, family: str
) -> None:
    folder = saved_selectors(tmp_path, family, saved, loaded)
    assert hf_hardattn.selectors(hf_hardattn.load(folder, dtype=wanted))
    edit(folder / "hard_attention.json", dtype="torch.int8")
    assert hf_hardattn.selectors(hf_hardattn.load(folder, dtype=wanted))


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_another_base_is_refused_in_every_dtype(tmp_path: Path, saved: torch.dtype, wanted: torch.dtype) -> None:
    folder = saved_selectors(tmp_path, "vit", saved)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["classifier.weight"][0, 0] += 0.1
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for said in (str(saved), "torch.float16", "torch.int8", "x"):
        edit(folder / "hard_attention.json", dtype=said)
        with pytest.raises(HardAttentionError, match=NOT_THE_BASE):
            hf_hardattn.load(folder, dtype=wanted)


def swap_layers(folder: Path) -> None:
    weights = load_file(folder / "base" / "model.safetensors")
    first, second = (sorted(name for name in weights if f".{layer}." in name) for layer in (0, 1))
    for a, b in zip(first, second, strict=True):
        weights[a], weights[b] = weights[b].clone(), weights[a].clone()
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})


def test_a_base_with_two_layers_swapped_is_refused(tmp_path: Path) -> None:
    folder = saved_selectors(tmp_path, "vit", torch.float32)
    swap_layers(tmp_path)
    with pytest.raises(HardAttentionError, match=NOT_THE_BASE):
        hf_hardattn.load(folder)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_format_1_is_read_with_its_own_fingerprint(tmp_path: Path, saved: torch.dtype, family: str) -> None:
    folder = saved_selectors(tmp_path, family, saved)
    model = hf_hardattn.load(folder, dtype=saved)
    old = fingerprint_of_format_1(model)
    assert old != fingerprint(model)
    edit(folder / "hard_attention.json", format=1, base_sha256=old)
    for dtype in DTYPES:
        assert hf_hardattn.selectors(hf_hardattn.load(folder, dtype=dtype))
    swap_layers(tmp_path) if family == "vit" else None  # names were no part of it
    assert hf_hardattn.selectors(hf_hardattn.load(folder))
    edit(folder / "hard_attention.json", format=1, base_sha256="0" * 64)
    with pytest.raises(HardAttentionError, match=NOT_THE_BASE):
        hf_hardattn.load(folder)


# constructors' options that no configuration holds, such as add_pooling_layer
OPTIONS = [
    (name, head, option.name, not option.default)
    for name in models.names()
    for head in models.load(name).spec.heads
    for option in inspect.signature(getattr(transformers, head, object)).parameters.values()
    if isinstance(option.default, bool)
]


@pytest.mark.parametrize("alone", [False, True], ids=["full", "selectors"])
@pytest.mark.parametrize(("family", "head", "option", "value"), OPTIONS)
def test_options_of_the_constructor_are_read_from_the_weights(
    tmp_path: Path, family: str, head: str, option: str, value: bool, alone: bool
) -> None:
    example = build(family, head)
    model = type(example.model)(example.model.config, **{option: value}).eval()
    assert model.state_dict().keys() != example.model.state_dict().keys()
    model.save_pretrained(tmp_path / "base")
    harden(model, {"sites": ["*.tokens.0"], "budget": 0.5})
    hf_hardattn.save(model, tmp_path / "saved", selectors_only=alone, base_model=str(tmp_path / "base"))
    loaded = hf_hardattn.load(tmp_path / "saved")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(model(**example.batch)[0], loaded(**example.batch)[0])


FORMS = {"full": "model", "selectors": "selectors", "peft": "adapter_model"}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """One model, saved in the form that the test asks for."""
    form = request.param
    stock().save_pretrained(tmp_path / "base")
    model = harden(stock())
    if form == "peft":
        model = with_adapter(model)
    return hf_hardattn.save(
        model, tmp_path / form, selectors_only=form == "selectors", base_model=str(tmp_path / "base")
    )


def each_weight(folder: Path, change: Any) -> None:
    """Rewrite the weights in ``folder``, with the selectors' changed."""
    path = folder / f"{FORMS[folder.name]}.safetensors"
    tensors = load_file(path)
    chosen = {n: t for n, t in tensors.items() if folder.name == "selectors" or "selector" in n}
    assert chosen
    save_file(tensors | {name: change(t) for name, t in chosen.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("folder", FORMS, indirect=True)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, bad: float) -> None:
    each_weight(folder, lambda tensor: torch.full_like(tensor, bad))
    with pytest.raises(HardAttentionError, match="holds values that are not finite"):
        hf_hardattn.load(folder)


@pytest.mark.parametrize("folder", FORMS, indirect=True)
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_weights_of_another_kind_are_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    each_weight(folder, lambda tensor: tensor.to(dtype))
    with pytest.raises(HardAttentionError, match=r"selector.* is of dtype"):
        hf_hardattn.load(folder)


def test_a_backbone_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = harden(stock())
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    hf_hardattn.save(model, tmp_path)
    with pytest.raises(HardAttentionError, match="'classifier.bias' holds values that are not finite"):
        hf_hardattn.load(tmp_path)


@pytest.mark.parametrize("folder", ["selectors", "peft"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LORA", "target_modules": "(([a-z_.0-9])+)+!", "r": 4},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 10**6},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2},
        {"base_model_name_or_path": "somebody/else"},
        {},
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_an_adapter_file_in_the_base_is_refused(folder: Path, settings: dict[str, Any], verify: bool) -> None:
    (folder.parent / "base" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(HardAttentionError, match="base contains adapter_config.json next to the weights"):
        hf_hardattn.load(folder, verify_base=verify)


@pytest.mark.parametrize("name", ["PreTrainedModel", "ViTPreTrainedModel", "nn", "ViTConfig", "__name__", ""])
def test_a_class_that_makes_no_model_is_refused(tmp_path: Path, name: str) -> None:
    hf_hardattn.save(harden(stock()), tmp_path)
    edit(tmp_path / "config.json", architectures=[name])
    with pytest.raises(HardAttentionError, match="names the class"):
        hf_hardattn.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"num_labels": 2**20 - 1}, {"hard_attention": {"sites": {f"vision.tokens.{n}*": {} for n in range(20_000)}}}],
    ids=["labels", "sites"],
)
def test_a_configuration_that_takes_minutes_to_read_is_refused_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    hf_hardattn.save(harden(stock()), tmp_path)
    edit(tmp_path / "config.json", **changes)
    started = time.process_time()
    with pytest.raises(HardAttentionError, match="num_labels=1,048,575|names 20,000 sites"):
        hf_hardattn.load(tmp_path)
    assert time.process_time() - started < 2


def test_loading_in_threads_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    model, tie_weights = harden(stock()), PreTrainedModel.tie_weights
    hf_hardattn.save(model, tmp_path)
    expected, answers = answer(model), []
    logging.set_verbosity(python_logging.INFO)
    try:
        threads = [
            threading.Thread(target=lambda: answers.append(answer(hf_hardattn.load(tmp_path)))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert logging.get_verbosity() == python_logging.INFO
        assert PreTrainedModel.tie_weights is tie_weights
    finally:
        logging.set_verbosity_warning()
    assert len(answers) == 8 and all(same(found, expected) for found in answers)


def test_a_bound_on_layers_is_no_number_of_layers(tmp_path: Path) -> None:
    """Qwen's ``max_window_layers`` may be larger than the model, as it is in published configurations."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, num_hidden_layers=1, vocab_size=40, max_window_layers=80)
    hf_hardattn.save(hf_hardattn.apply(Qwen2ForCausalLM(config), {"sites": ["decoder.inputs"]}), tmp_path)
    assert hf_hardattn.selectors(hf_hardattn.load(tmp_path))
