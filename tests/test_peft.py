"""PEFT's own ways to train, save and load adapters of hard models, without a word of this library's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForSeq2SeqLM,
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import hf_hardattn
from hf_hardattn import HardAttentionError

HARD: dict[str, Any] = {"sites": ["vision.inputs", "vision.tokens.1"], "budget": 0.5}
SIZES: dict[str, Any] = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stir(model: nn.Module) -> Any:
    """Move all that is trained, as a training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3)
    stir(ViTForImageClassification(config)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(base: Path) -> Any:
    """A hard model with a LoRA adapter, whose configuration names no selectors."""
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    return stir(get_peft_model(hard, LoraConfig(r=2, target_modules=["q_proj"])))


@pytest.fixture
def folder(adapted: Any, tmp_path: Path) -> Path:
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**images()).logits


def assert_hard_as(found: Any, expected: Any) -> None:
    assert list(hf_hardattn.selectors(found)) == HARD["sites"]
    torch.testing.assert_close(logits(found), logits(expected), atol=0, rtol=0)
    with hf_hardattn.soft(found):
        assert not torch.equal(logits(found), logits(expected))


# ------------------------------------------------------------------------------------------------------------------- training

METHODS = {
    "LoRA": LoraConfig(r=2, target_modules=["q_proj"]),
    "LoRA with a classifier": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]),
    "LoRA of every linear layer": LoraConfig(r=2, target_modules="all-linear"),
    "IA3": IA3Config(target_modules=["k_proj", "fc1"], feedforward_modules=["fc1"]),
    "VeRA": VeraConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_trains_and_keeps_the_selectors_it_does_not_name(base: Path, tmp_path: Path, method: str) -> None:
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    model = get_peft_model(hard, METHODS[method])
    trained = [p for selector in hf_hardattn.selectors(model).values() for p in selector.parameters()]
    assert trained and all(p.requires_grad for p in trained)
    model.train()(**images(), labels=torch.tensor([0, 1])).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in trained)
    stir(model).save_pretrained(tmp_path / "adapter")
    found = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), tmp_path / "adapter")
    assert_hard_as(found, model)


def test_modules_to_save_that_name_selectors_stay_as_they_are(base: Path) -> None:
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["selector", "classifier"])
    get_peft_model(hard, config)
    assert list(config.modules_to_save) == ["selector", "classifier"]  # PEFT matches the end of a name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", [None, {**HARD, "sites": ["vision.inputs"]}], ids=["soft", "one site"])
def test_selectors_made_after_the_adapter_are_trained_and_saved_with_it(
    base: Path, tmp_path: Path, before: Any, method: str
) -> None:
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=before)
    model = hf_hardattn.apply(get_peft_model(hard, METHODS[method]), HARD)
    trained = [p for selector in hf_hardattn.selectors(model).values() for p in selector.parameters()]
    assert len(trained) == 7 and all(p.requires_grad for p in trained)
    stir(model).save_pretrained(tmp_path / "adapter")
    assert_hard_as(hf_hardattn.load(tmp_path / "adapter"), model)


def test_selectors_made_after_several_adapters_are_their_own(base: Path) -> None:
    model = get_peft_model(ViTForImageClassification.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    hf_hardattn.apply(model, HARD)
    first = logits(stir(model))
    model.set_adapter("other")
    assert not torch.equal(logits(stir(model)), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_selectors_made_after_an_adapter_of_transformers_are_saved_with_it(base: Path, tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    stir(hf_hardattn.apply(model, HARD)).save_pretrained(tmp_path / "adapter")
    assert_hard_as(ViTForImageClassification.from_pretrained(tmp_path / "adapter"), model)


def test_an_adapter_may_hold_the_selectors_biases_twice(base: Path, tmp_path: Path) -> None:
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    model = stir(get_peft_model(hard, LoraConfig(r=2, target_modules=["q_proj"], bias="all")))
    model.save_pretrained(tmp_path / "adapter")
    for load in (WAYS["PeftModel"], lambda base, folder: hf_hardattn.load(folder)):
        assert_hard_as(load(base, tmp_path / "adapter"), model)


def test_single_parameters_of_selectors_are_no_targets(base: Path) -> None:
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    with pytest.raises(
        HardAttentionError, match="'selector.scorer.weight' names 'vit.layers.1.selector.scorer.weight'"
    ):
        get_peft_model(hard, LoraConfig(target_modules=[], target_parameters=["selector.scorer.weight"]))


def test_adapters_of_soft_models_gain_nothing(base: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    get_peft_model(ViTForImageClassification.from_pretrained(base), config)
    assert config.modules_to_save is None


def test_an_adapter_of_transformers_holds_the_selectors(base: Path, tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    stir(model).save_pretrained(tmp_path / "adapter")
    assert_hard_as(AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"), model)


def test_prompt_learning_says_that_it_trains_no_selector() -> None:
    sizes = dict(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    model = hf_hardattn.apply(T5ForConditionalGeneration(T5Config(**sizes)), {"sites": ["encoder.tokens.0"]})
    with pytest.warns(UserWarning, match="the selectors of hard attention are not trained"):
        get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2))


def test_the_callback_says_that_no_selector_is_trained(base: Path, tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    for selector in hf_hardattn.selectors(model).values():
        selector.requires_grad_(False)
    data = [{"pixel_values": image, "labels": 0} for image in images()["pixel_values"]]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    with pytest.warns(UserWarning, match="no selector of ViTForImageClassification is trained"):
        Trainer(model, arguments, train_dataset=data, callbacks=[hf_hardattn.HardAttentionCallback()]).train()


# -------------------------------------------------------------------------------------------------------------------- loading

WAYS = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(base), folder
    ),
    "PeftModel, a path as text": lambda base, folder: PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(base), str(folder)
    ),
    "PeftModel, to be trained": lambda base, folder: PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(base), folder, is_trainable=True
    ),
    "PeftModel of a hard base": lambda base, folder: PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(base, hard_attention=HARD), folder
    ),
    "PeftMixedModel": lambda base, folder: PeftMixedModel.from_pretrained(
        ViTForImageClassification.from_pretrained(base), folder
    ),
    "AutoPeftModel": lambda base, folder: AutoPeftModel.from_pretrained(folder),
    "Auto class of Transformers": lambda base, folder: AutoModelForImageClassification.from_pretrained(folder),
    "class of Transformers": lambda base, folder: ViTForImageClassification.from_pretrained(folder),
    "load_adapter of Transformers": lambda base, folder: _with_adapter(base, folder),
    "hf_hardattn": lambda base, folder: hf_hardattn.load(folder),
}


def _with_adapter(base: Path, folder: Path) -> Any:
    model = ViTForImageClassification.from_pretrained(base)
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_of_a_hard_model_loads_hard(base: Path, folder: Path, adapted: Any, way: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = WAYS[way](base, folder)
    assert_hard_as(found, adapted)


def test_auto_peft_model_of_a_task_loads_hard(tmp_path: Path) -> None:
    sizes = dict(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, decoder_start_token_id=0)
    stir(T5ForConditionalGeneration(T5Config(**sizes))).save_pretrained(tmp_path / "base")
    hard = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", hard_attention={"sites": ["encoder.tokens.0"]})
    model = stir(get_peft_model(hard, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q"])))
    model.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "decoder_input_ids": torch.tensor([[0, 4], [0, 5]])}
    found = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert list(hf_hardattn.selectors(found)) == ["encoder.tokens.0"]
        assert torch.equal(found(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("way", ["Auto class of Transformers", "class of Transformers"])
def test_an_adapter_folder_keeps_the_labels_of_its_configuration(base: Path, tmp_path: Path, way: str) -> None:
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=HARD, id2label={0: "a", 1: "b", 2: "c"})
    model = get_peft_model(hard, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    stir(model).save_pretrained(tmp_path / "adapter")
    found = WAYS[way](base, tmp_path / "adapter")
    assert found.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert_hard_as(found, model)


def test_a_soft_adapter_loads_as_ever(base: Path, tmp_path: Path) -> None:
    model = stir(get_peft_model(ViTForImageClassification.from_pretrained(base), LoraConfig(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    for way in ("PeftModel", "AutoPeftModel", "Auto class of Transformers", "load_adapter of Transformers"):
        found = WAYS[way](base, tmp_path / "adapter")
        assert not hf_hardattn.selectors(found) and torch.equal(logits(found), logits(model)), way


def test_hard_attention_none_loads_an_adapter_soft(base: Path, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        soft = ViTForImageClassification.from_pretrained(base, hard_attention=None)
        found = [PeftModel.from_pretrained(soft, folder)]
        found += [AutoModelForImageClassification.from_pretrained(folder, hard_attention=None)]
    assert not any(hf_hardattn.selectors(model) for model in found)


def test_a_second_hard_adapter_has_its_own_selectors(base: Path, folder: Path, adapted: Any, tmp_path: Path) -> None:
    stir(adapted).save_pretrained(tmp_path / "other")
    found = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), folder)
    found.load_adapter(tmp_path / "other", "other")
    found.set_adapter("other")
    assert_hard_as(found, adapted)
    found.set_adapter("default")
    assert not torch.equal(logits(found), logits(adapted))


def test_a_hard_adapter_beside_soft_ones_is_refused(base: Path, folder: Path) -> None:
    soft = get_peft_model(ViTForImageClassification.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    before = logits(soft)
    with pytest.raises(HardAttentionError, match="the other adapters would become hard too"):
        soft.load_adapter(folder, "hard")
    assert torch.equal(logits(soft), before) and list(soft.peft_config) == ["default"]


def test_an_adapter_of_other_sites_is_refused(base: Path, folder: Path) -> None:
    model = ViTForImageClassification.from_pretrained(base, hard_attention={"sites": ["vision.inputs"]})
    with pytest.raises(HardAttentionError, match=r"holds 2 selector tensors that the model does not have"):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(
    "way", ["PeftModel", "AutoPeftModel", "Auto class of Transformers", "load_adapter of Transformers"]
)
def test_an_adapter_without_the_selectors_of_a_soft_base_is_refused(base: Path, tmp_path: Path, way: str) -> None:
    """As PEFT wrote it before the selectors were added: their initial values would be drawn anew at every load."""
    hard = ViTForImageClassification.from_pretrained(base, hard_attention=HARD)
    model = get_peft_model(hard, LoraConfig(target_modules=["q_proj"], inference_mode=True))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(HardAttentionError, match="lacks 7 selector tensors"):
        WAYS[way](base, tmp_path / "adapter")


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter of Transformers"])
def test_an_adapter_whose_configuration_is_lost_runs_soft_and_says_so(base: Path, folder: Path, way: str) -> None:
    (folder / "config.json").unlink()
    with pytest.warns(UserWarning, match="the model runs SOFT"):
        found = WAYS[way](base, folder)
    assert not hf_hardattn.selectors(found)


def test_a_configuration_that_does_not_fit_the_base_is_refused(base: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hard_attention"]["sites"] = {"vision.tokens.7": {}}
    (folder / "config.json").write_text(json.dumps(config))
    model = ViTForImageClassification.from_pretrained(base)
    before = logits(model)
    with pytest.raises(HardAttentionError, match="no site matches 'vision.tokens.7'"):
        PeftModel.from_pretrained(model, folder)
    assert torch.equal(logits(model), before)
