"""Faults that users of other libraries reported, or that a review of version 1 confirmed: each test is named after what it guards.

Every test asks for what stock Transformers does, or for what the documentation promises, of tiny models with random weights. Where the
library may refuse instead, the test says so: a refusal is a ``HardAttentionError``, made before anything was computed wrongly.
"""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    AttentionInterface,
    AutoModelForImageClassification,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    T5Model,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_hardattn
from hf_hardattn import HardAttentionError

SIZES: dict[str, Any] = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=32)
T5_SIZES: dict[str, Any] = dict(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------------- tiny models


def vit_config(**changes: Any) -> ViTConfig:
    images = dict(image_size=32, patch_size=8, num_labels=3, hidden_dropout_prob=0.0)
    return ViTConfig(**{**SIZES, **images, **changes})


def shaken(cls: Callable[[Any], Any], config: Any) -> Any:
    """A model in evaluation mode, the same at every call, with weights so large that it matters what is selected."""
    torch.manual_seed(1)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def harden(model: Any, **hard: Any) -> Any:
    """Apply a configuration, with selectors whose scores differ clearly between positions."""
    hf_hardattn.apply(model, {"scorer": "linear", "anneal": 0, **hard})
    draw_selectors(model, 2)
    return model


def draw_selectors(model: Any, seed: int, std: float = 0.5) -> None:
    """Draw the parameters of all selectors."""
    torch.manual_seed(seed)
    for selector in hf_hardattn.selectors(model).values():
        for parameter in selector.parameters():
            nn.init.normal_(parameter, std=std)


def vit(*sites: str, config: dict[str, Any] | None = None, **hard: Any) -> Any:
    """A ViT of 16 patches; hard where sites are named."""
    model = shaken(ViTForImageClassification, vit_config(**(config or {})))
    return harden(model, sites=list(sites), **hard) if sites else model


def t5(*sites: str, config: dict[str, Any] | None = None, **hard: Any) -> Any:
    """A T5 of 2 + 2 layers; hard where sites are named."""
    sizes = {**T5_SIZES, "decoder_start_token_id": 0, **(config or {})}
    model = shaken(T5ForConditionalGeneration, T5Config(**sizes))
    return harden(model, sites=list(sites), **hard) if sites else model


def blip(*sites: str, **hard: Any) -> Any:
    """A captioning BLIP of 16 patches; hard where sites are named."""
    ends = dict(bos_token_id=57, eos_token_id=58, sep_token_id=58, pad_token_id=0)
    text = dict(**SIZES, **ends, vocab_size=60, encoder_hidden_size=24)
    vision = dict(**SIZES, image_size=32, patch_size=8)
    model = shaken(BlipForConditionalGeneration, BlipConfig(text_config=text, vision_config=vision))
    return harden(model, sites=list(sites), **hard) if sites else model


def clip(*sites: str, **hard: Any) -> Any:
    """A classifying CLIP of 16 patches; hard where sites are named."""
    vision = CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)
    model = shaken(CLIPForImageClassification, CLIPConfig(vision_config=vision.to_dict(), num_labels=3))
    return harden(model, sites=list(sites), **hard) if sites else model


def pixels(batch: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(4))


def ids(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": pixels(batch), "labels": torch.arange(batch) % 3}


def texts(source: int = 9) -> dict[str, Tensor]:
    return {"input_ids": ids(2, source), "labels": ids(2, 4, seed=6)}


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any] | None = None) -> Tensor:
    return model(**(batch or images())).logits


def differ(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max())


def selector_names(model: nn.Module) -> list[str]:
    """What the modules that hold selectors are called, for PEFT's ``modules_to_save``."""
    inside = {id(selector) for selector in hf_hardattn.selectors(model).values()}
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in inside})


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=selector_names(model)))


def in_graph(model: Any) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS = pytest.mark.parametrize("wrap", [lora, in_graph], ids=["PEFT", "compiled"])


@contextlib.contextmanager
def allowing_refusal() -> Iterator[None]:
    """A clear refusal is as good as the right value."""
    with contextlib.suppress(HardAttentionError):
        yield


SHALLOW = {"num_hidden_layers": 1}  # compiling takes seconds a layer
COMPILED = pytest.mark.parametrize("how", ["torch.compile", "model.compile"])


def compiled(model: Any, how: str) -> Any:
    """A compiled model that ran once already, as in a server or a Trainer, and so is not compiled again for the same call."""
    torch._dynamo.reset()
    if how == "torch.compile":
        run = in_graph(model)
    else:
        model.compile(backend="eager")
        run = model
    with torch.set_grad_enabled(model.training):
        for _ in range(2):  # the first call with labels notes the kind of problem in the configuration
            run(**images())
    return run


# ------------------------------------------------------------------------------------------------------ layers are stock modules


def test_layers_of_a_hard_tower_are_stock_modules() -> None:
    model = vit("vision.tokens.0")
    for index, layer in enumerate(model.vit.layers):
        assert isinstance(layer, nn.Module) and layer is model.vit.layers[index]


def test_what_is_written_to_iterated_layers_stays() -> None:
    model = vit("vision.tokens.0")
    for layer in model.vit.layers:
        layer.mlp, layer.mark = nn.Identity(), 7
    assert all(isinstance(layer.mlp, nn.Identity) and layer.mark == 7 for layer in model.vit.layers)


def test_lists_of_layers_can_be_rebuilt_and_joined() -> None:
    layers = vit("vision.tokens.0").vit.layers
    assert len(nn.ModuleList(list(layers))) == 3
    assert len(layers + layers) == 6


def test_slices_of_layers_run_as_a_shallower_model() -> None:
    model, shallow = vit("vision.tokens.0"), vit("vision.tokens.0", config={"num_hidden_layers": 2})
    shallow.load_state_dict({k: v for k, v in model.state_dict().items() if ".layers.2." not in k})
    model.vit.layers = model.vit.layers[:2]
    assert torch.equal(logits(model), logits(shallow))


def test_a_wrapper_around_a_layer_runs() -> None:
    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.wrapped = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.wrapped(*args, **kwargs)

    model = vit("vision.tokens.0")
    expected = logits(model)
    model.vit.layers[1] = Wrapper(model.vit.layers[1])
    assert torch.equal(logits(model), expected)


def test_layers_can_be_sharded_one_by_one() -> None:
    model = vit("vision.tokens.0")
    expected = logits(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in model.vit.layers:
            fully_shard(layer)
        assert differ(logits(model), expected) <= TOLERANCE
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("site", ["vision.inputs", "vision.tokens.1", "vision.self.1"])
def test_hooks_on_layers_see_what_stock_layers_give(site: str) -> None:
    model, seen = vit(site), []
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda layer, args, output: seen.append(type(output)))
    logits(model)
    assert seen == [Tensor] * 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_hook_can_replace_the_output_of_a_layer(number: int) -> None:
    model = vit("vision.tokens.1")
    before = logits(model)
    model.vit.layers[number].register_forward_hook(lambda layer, args, output: output + torch.arange(24.0))
    assert differ(logits(model), before) > 1e-3


def test_embeddings_of_scout_are_a_tensor() -> None:
    model, seen = vit("vision.inputs", scorer="scout", budget=4), []
    model.vit.embeddings.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    logits(model)
    assert seen == [Tensor]


# ------------------------------------------------------------------------------------------------------------- models as users build them


class OwnHead(PreTrainedModel):
    config_class = ViTConfig
    base_model_prefix = "vit"

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit, self.head = ViTModel(config), nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.vit(pixel_values).last_hidden_state[:, 0])


def test_a_site_of_the_outer_model_alone_is_refused_only_by_the_outermost() -> None:
    """The towers inside are built first, and know neither the other towers nor what is special about this head."""
    assert list(hf_hardattn.selectors(TwoTowers(vit_config(hard_attention={"sites": ["vision2.inputs"]}))))
    for cls in (TwoTowers, ViTForImageClassification, ViTModel):
        with pytest.raises(HardAttentionError, match=f"no site matches 'vision3.inputs' in {cls.__name__}"):
            cls(vit_config(hard_attention={"sites": ["vision3.inputs", "vision.inputs"]}))


class StrictForImageClassification(ViTForImageClassification):
    """Named as Transformers names such a head: the loss function is found by the name of the class."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(pixel_values, labels=labels)


class SwallowingForImageClassification(ViTForImageClassification):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(pixel_values, labels=labels)


def test_an_own_head_around_a_supported_base_is_hard() -> None:
    model = OwnHead(vit_config(hard_attention={"sites": ["vision.inputs"], "budget": 4})).eval()
    with torch.no_grad(), hf_hardattn.record(model) as selections:
        model(pixels())
    assert selections.kept(selections["vision.inputs"][0]).sum(-1).flatten().tolist() == [5, 5]


def test_a_head_that_returns_a_tensor_trains() -> None:
    """Its loss is computed outside, so a reward has nothing to ride in, and that is said."""
    model = OwnHead(vit_config(hard_attention={"sites": ["vision.inputs"], "budget": 4})).train()
    model(pixels()).sum().backward()
    hf_hardattn.apply(model, {"sites": ["vision.inputs"], "budget": 4, "estimator": "reinforce"})
    with pytest.warns(UserWarning, match="reward"):
        model(pixels())


def test_a_strict_forward_signature_is_no_obstacle() -> None:
    model = harden(shaken(StrictForImageClassification, vit_config()), sites=["vision.inputs"], budget=4)
    assert torch.equal(logits(model), logits(vit("vision.inputs", budget=4)))


def test_a_subclass_of_a_head_is_that_head() -> None:
    """What a family knows of a head holds for a user's subclass of it under any name."""

    class MineT5(T5ForConditionalGeneration):
        pass

    class MineDinov2(Dinov2ForImageClassification):
        pass

    model = harden(shaken(MineT5, T5Config(**T5_SIZES, decoder_start_token_id=0)), sites=["decoder.cross.*"])
    harden(model, sites=["decoder.cross.*"], estimator="variational").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**texts()).loss.backward()  # the inference network reads the labels
    with pytest.raises(HardAttentionError, match="averages the rows"):
        harden(
            MineDinov2(Dinov2Config(**SIZES, image_size=32, patch_size=8)), sites=["vision.inputs"], budget="top_p:0.5"
        )


STRICT: dict[str, dict[str, Any]] = {
    "reinforce": {"estimator": "reinforce", "baseline": "self_critical"},
    "rloo": {"estimator": "rloo"},
    "marginal": {"estimator": "marginal", "budget": 1},
    "distil": {"estimator": "distil"},
    "self-distillation": {"self_distillation": 1.0},
}


@pytest.mark.parametrize("option", STRICT)
def test_a_strict_forward_signature_trains(option: str) -> None:
    losses = []
    for cls in (StrictForImageClassification, ViTForImageClassification):
        model = harden(shaken(cls, vit_config()), sites=["vision.inputs"], **{"budget": 4, **STRICT[option]}).train()
        torch.manual_seed(3)
        losses.append(model(**images()).loss.detach())
    assert torch.equal(*losses)


def test_a_subclass_of_a_stock_attention_works_or_is_refused_when_attached() -> None:
    model, expected = vit(), logits(vit("vision.self.0"))
    attention = model.vit.layers[0].attention
    attention.__class__ = type("Mine", (type(attention),), {})
    with allowing_refusal():
        harden(model, sites=["vision.self.0"])
        assert differ(logits(model), expected) <= TOLERANCE


def test_a_registered_attention_function_is_called_at_sites_or_refused_when_attached() -> None:
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("mine", mine)
    with allowing_refusal():
        model = vit("vision.self.*", config={"attn_implementation": "mine"})
        logits(model)
        assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.5, "threshold:0.5"])
@pytest.mark.parametrize("site", ["vision.tokens.0", "vision.self.0", "vision.inputs"])
def test_flex_attention_gives_what_sdpa_gives_or_is_refused_when_attached(site: str, budget: Any) -> None:
    size = {"hidden_size": 48}
    expected = logits(vit(site, budget=budget, config=size))
    with allowing_refusal():
        model = vit(site, budget=budget, config={**size, "attn_implementation": "flex_attention"})
        assert differ(logits(model), expected) <= TOLERANCE


def test_scout_is_exported() -> None:
    model, batch = vit("vision.inputs", scorer="scout", budget=4), {"pixel_values": pixels()}
    exported = torch.export.export(model, (), batch, strict=False)
    assert differ(exported.module()(**batch).logits, logits(model)) <= TOLERANCE


def test_a_config_shared_by_two_models_belongs_to_the_one_that_was_made_hard(tmp_path: Path) -> None:
    config = vit_config()
    first, second = ViTForImageClassification(config), ViTForImageClassification(config)
    hf_hardattn.apply(first, {"sites": ["vision.inputs"], "budget": 4})
    assert getattr(second.config, "hard_attention", None) is None
    second.save_pretrained(tmp_path)
    assert not hf_hardattn.selectors(ViTForImageClassification.from_pretrained(tmp_path))


def test_removing_one_model_leaves_another_of_the_same_config_hard(tmp_path: Path) -> None:
    config = vit_config()
    first, second = ViTForImageClassification(config), ViTForImageClassification(config)
    for model in (first, second):
        hf_hardattn.apply(model, {"sites": ["vision.inputs"], "budget": 4})
    hf_hardattn.remove(first)
    second.save_pretrained(tmp_path)
    assert hf_hardattn.selectors(ViTForImageClassification.from_pretrained(tmp_path))


def test_two_towers_of_one_name_have_their_own_selectors() -> None:
    towers = [hf_hardattn.apply(ViTModel(vit_config()), {"sites": ["vision.inputs"], "budget": 4}) for _ in range(2)]
    container = nn.ModuleList(towers)
    assert list(hf_hardattn.selectors(container)) == ["vision.inputs", "vision2.inputs"]
    with torch.no_grad(), hf_hardattn.record(container) as selections:
        expected = [tower.eval()(pixels()).last_hidden_state for tower in towers]
    assert selections.sites == ["vision.inputs", "vision2.inputs"]
    first = (torch.arange(17) < 5).expand(2, -1)
    with torch.no_grad(), hf_hardattn.replay(container, {"vision2.inputs": first}):
        found = [tower(pixels()).last_hidden_state for tower in towers]
    assert torch.equal(found[0], expected[0]) and differ(found[1], expected[1]) > TOLERANCE


class TwoTowers(PreTrainedModel):
    config_class = ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.left, self.right, self.head = ViTModel(config), ViTModel(config), nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        rows = self.left(pixel_values).last_hidden_state + self.right(pixel_values).last_hidden_state
        predicted = self.head(rows[:, 0])
        return {"loss": None if labels is None else nn.functional.cross_entropy(predicted, labels), "logits": predicted}


@pytest.mark.parametrize("sites", [["vision*.inputs"], ["vision.inputs", "vision2.inputs"]])
def test_two_towers_of_one_name_are_numbered_in_the_model_around_them(tmp_path: Path, sites: list[str]) -> None:
    hard = {"sites": sites, "budget": 4, "estimator": "reinforce"}
    model = shaken(TwoTowers, vit_config(hard_attention=hard))
    sites = ["vision.inputs", "vision2.inputs"]
    assert [selector.site for selector in hf_hardattn.selectors(model).values()] == sites
    with torch.no_grad(), hf_hardattn.record(model) as selections:
        expected = model(pixels())["logits"]
    assert selections.sites == sites
    model.save_pretrained(tmp_path)
    loaded = TwoTowers.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert list(hf_hardattn.selectors(loaded)) == sites and torch.equal(loaded(pixels())["logits"], expected)
    labels = torch.tensor([0, 1])
    model.train()(pixels(), labels)["loss"].backward()
    for site, selector in hf_hardattn.selectors(model).items():
        assert any(p.grad is not None and p.grad.any() for p in selector.parameters()), site


def test_a_hard_model_is_made_of_a_state_dict_without_a_name() -> None:
    config = vit_config(hard_attention={"sites": ["vision.inputs"], "budget": 4})
    model = ViTForImageClassification.from_pretrained(None, config=config, state_dict=vit().state_dict())
    assert list(hf_hardattn.selectors(model)) == ["vision.inputs"]


def test_auto_classes_take_hard_attention_none_without_a_warning(tmp_path: Path) -> None:
    vit("vision.tokens.0").save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = AutoModelForImageClassification.from_pretrained(tmp_path, hard_attention=None)
    assert not hf_hardattn.selectors(model)
    assert not [str(warning.message) for warning in said if "hard_attention" in str(warning.message)]


def test_a_second_copy_of_the_package_reads_its_own_configuration() -> None:
    """As a vendored copy or an autoreload makes one; in a process of its own, since both copies patch Transformers."""
    code = """
import sys
from transformers import ViTConfig, ViTForImageClassification
import hf_hardattn as first
for name in [name for name in sys.modules if name.split(".")[0] == "hf_hardattn"]:
    del sys.modules[name]
import hf_hardattn as second
sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32, image_size=32, patch_size=8)
hard = second.HardAttentionConfig(sites=["vision.inputs"], budget=4)
model = ViTForImageClassification(ViTConfig(**sizes, hard_attention=hard))
assert first is not second and (first.selectors(model) or second.selectors(model))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_ratio_of_1_survives_a_json_writer_that_prints_it_as_1(tmp_path: Path) -> None:
    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shortened(each) for name, each in value.items()}
        if isinstance(value, list):
            return [shortened(each) for each in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    model = vit("vision.inputs", budget=1.0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shortened(json.loads(path.read_text()))))
    assert differ(logits(ViTForImageClassification.from_pretrained(tmp_path).eval()), logits(vit())) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------------ wrappers and offloading


OFFLOADED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "scorer linear": (lambda: vit("vision.tokens.0", budget=4), images()),
    "scorer scout and the patch projection": (lambda: vit("vision.inputs", scorer="scout", budget=4), images()),
    "scorer scout and a table of positions": (lambda: clip("vision.inputs", scorer="scout", budget=4), images()),
    "scorer recurrent": (lambda: vit("vision.inputs", scorer="recurrent", budget=4), images()),
    "the position bias of T5": (lambda: t5("decoder.cross.*", scorer="attention", budget=4), texts()),
    "the fused projection of BLIP": (
        lambda: blip("vision.self.*", scorer="attention", budget=4),
        {"pixel_values": pixels(), "input_ids": ids(2, 6)},
    ),
}


@pytest.mark.parametrize("part", OFFLOADED)
def test_offloaded_weights_give_the_same(part: str) -> None:
    build, batch = OFFLOADED[part]
    expected = logits(build(), batch)
    offloaded = accelerate.cpu_offload(build(), execution_device="cpu")
    assert torch.equal(logits(offloaded, batch), expected)


def test_modules_with_accelerate_hooks_become_hard() -> None:
    model, expected = vit(), logits(vit("vision.self.*", budget=4))
    for module in list(model.modules()):
        if type(module).__name__ in ("ViTAttention", "ViTLayer"):
            add_hook_to_module(module, ModelHook())
    harden(model, sites=["vision.self.*"], budget=4)
    with hf_hardattn.record(model) as selections:
        found = logits(model)
    assert len(selections) == 3 and torch.equal(found, expected)


@WRAPPERS
def test_a_reward_set_on_a_wrapper_is_used(wrap: Callable[[Any], Any]) -> None:
    model, called = vit("vision.inputs", estimator="reinforce", baseline="none").train(), []
    hf_hardattn.set_reward(wrap(model), lambda inputs, output: (called.append(1), torch.zeros(2))[1])
    model(**images())
    assert called


@WRAPPERS
def test_remove_reaches_through_a_wrapper(wrap: Callable[[Any], Any]) -> None:
    model = vit("vision.inputs")
    hf_hardattn.remove(wrap(model))
    assert not hf_hardattn.selectors(model) and differ(logits(model), logits(vit())) <= TOLERANCE


@WRAPPERS
def test_verify_and_selectors_agree_on_a_wrapper(wrap: Callable[[Any], Any]) -> None:
    wrapper = wrap(vit("vision.inputs"))
    assert list(hf_hardattn.selectors(wrapper)) == ["vision.inputs"]
    assert len(hf_hardattn.verify(wrapper, {"pixel_values": pixels()}).sites) == 1


def test_an_adapter_that_leaves_selectors_untrained_says_so(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(vit("vision.tokens.0"), LoraConfig(target_modules=["q_proj"])).train()
        model(**images()).loss.backward()
        model.save_pretrained(tmp_path)
    trained = any(p.requires_grad for s in hf_hardattn.selectors(model).values() for p in s.parameters())
    assert trained or any("selector" in str(warning.message) for warning in said)


def test_prefix_tuning_runs_or_is_refused_in_words() -> None:
    model = get_peft_model(
        t5("decoder.self.*"), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    ).train()
    batch = {**texts(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    with allowing_refusal():
        assert model(**batch).loss.isfinite()


# ------------------------------------------------------------------------------------------------------------------ compiled models


@COMPILED
def test_a_compiled_model_that_ran_is_recorded(how: str) -> None:
    model = vit("vision.inputs", budget=4, config=SHALLOW)
    run = compiled(model, how)
    with torch.no_grad(), hf_hardattn.record(model) as selections:
        run(**images())
        run(**images())
    assert len(selections["vision.inputs"]) == 2


@COMPILED
def test_a_compiled_model_that_ran_is_replayed(how: str) -> None:
    keep = torch.arange(17).expand(2, -1) > 12
    keep = keep | (torch.arange(17) == 0)
    expected = vit("vision.inputs", budget=4, config=SHALLOW)
    with hf_hardattn.replay(expected, {"vision.inputs": keep}):
        wanted = logits(expected)
    model = vit("vision.inputs", budget=4, config=SHALLOW)
    run = compiled(model, how)
    with hf_hardattn.replay(model, {"vision.inputs": keep}):
        replayed = logits(run)
    assert differ(replayed, wanted) <= TOLERANCE < differ(logits(run), wanted)


@COMPILED
def test_a_compiled_model_that_ran_takes_a_new_reward(how: str) -> None:
    model, called = vit("vision.inputs", estimator="reinforce", baseline="none", budget=4, config=SHALLOW).train(), []
    run = compiled(model, how)
    hf_hardattn.set_reward(model, lambda inputs, output: (called.append(1), torch.ones(2))[1])
    run(**images())
    assert called


@COMPILED
def test_a_compiled_model_with_a_strict_signature_is_recorded_afterwards(how: str) -> None:
    """Compiled code cannot end what a context variable began: nothing may be left open."""
    model = harden(shaken(StrictForImageClassification, vit_config(**SHALLOW)), sites=["vision.inputs"], budget=4)
    run = compiled(model, how)
    with hf_hardattn.record(model) as selections:
        logits(run)
    assert len(selections["vision.inputs"]) == 1


@COMPILED
def test_a_compiled_model_with_a_strict_signature_trains_or_is_refused(how: str) -> None:
    simple = harden(shaken(StrictForImageClassification, vit_config(**SHALLOW)), sites=["vision.inputs"], budget=4)
    compiled(simple.train(), how)(**images()).loss.backward()
    assert any(p.grad.any() for p in hf_hardattn.selectors(simple)["vision.inputs"].parameters())
    reinforce = harden(simple, sites=["vision.inputs"], budget=4, estimator="reinforce")
    with pytest.raises(HardAttentionError, match="does not pass its keyword arguments"):
        compiled(reinforce, how)
    reinforce.__class__ = SwallowingForImageClassification
    with pytest.raises(HardAttentionError, match="does not pass its keyword arguments"):
        compiled(harden(reinforce, sites=["vision.inputs"], budget=4, estimator="reinforce"), how)


@pytest.mark.parametrize("swallows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_decoder_that_hands_no_keywords_down_is_refused(swallows: bool) -> None:
    """It would choose among the answer too, because it does not know the labels."""

    class Strict(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids, labels=labels)

    class Swallowing(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids, labels=labels)

    torch._dynamo.reset()
    ids = torch.randint(3, 40, (2, 9))
    batch = {"input_ids": ids, "labels": ids.where(torch.arange(9) > 5, -100)}
    sizes = dict(vocab_size=40, hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=24)
    model = shaken(Swallowing if swallows else Strict, LlamaConfig(**sizes))
    harden(model, sites=["decoder.inputs"], budget=0.5)(**batch)  # as it is, it runs
    with pytest.raises(
        HardAttentionError, match="forward does not pass its keyword arguments on.* 'decoder' .* labelled"
    ):
        in_graph(model)(**batch)


@pytest.mark.parametrize("swallows", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", [T5ForSequenceClassification, T5Model])
def test_a_compiled_encoder_decoder_that_hands_no_keywords_down_is_refused(head: Any, swallows: bool) -> None:
    """Its decoder would not know what the encoder kept, and a head that copies the input would show it whole."""

    class Strict(head):
        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids, decoder_input_ids=decoder_input_ids)

    class Swallowing(head):
        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids, decoder_input_ids=decoder_input_ids)

    torch._dynamo.reset()
    batch = {"input_ids": texts()["input_ids"]}
    batch["input_ids"][:, -1] = 1  # the end, where the head of a classifier looks
    if head is T5Model:
        batch["decoder_input_ids"] = batch["input_ids"]
    sizes = {**T5_SIZES, "num_layers": 1}
    model = shaken(Swallowing if swallows else Strict, T5Config(**sizes, decoder_start_token_id=0))
    harden(model, sites=["encoder.inputs"], budget=4)(**batch)  # as it is, it runs
    with pytest.raises(
        HardAttentionError,
        match="ing.forward does not pass its keyword arguments on.* 'decoder'"
        if swallows
        else "Strict.forward does not pass",
    ):
        in_graph(model)(**batch)


@COMPILED
def test_a_compiled_model_that_ran_follows_apply_set_budget_and_remove(how: str) -> None:
    model = vit("vision.inputs", budget=4, config=SHALLOW)
    run = compiled(model, how)
    hf_hardattn.set_budget(model, 2)
    assert torch.equal(logits(run), logits(vit("vision.inputs", budget=2, config=SHALLOW)))
    hf_hardattn.remove(model)
    assert differ(logits(run), logits(vit(config=SHALLOW))) <= TOLERANCE
    harden(model, sites=["vision.inputs"], budget=4)
    assert torch.equal(logits(run), logits(vit("vision.inputs", budget=4, config=SHALLOW)))


@COMPILED
def test_a_compiled_model_that_ran_is_verified_at_every_site(how: str) -> None:
    model = vit("vision.inputs", budget=4, config=SHALLOW)
    compiled(model, how)
    assert len(hf_hardattn.verify(model, {"pixel_values": pixels()}).sites) == 1


# ------------------------------------------------------------------------------------------------------- modes, recordings and threads


def test_soft_in_one_thread_leaves_another_hard() -> None:
    model = vit("vision.inputs", budget=2)
    expected, entered, done = logits(model), threading.Event(), threading.Event()

    def other() -> None:
        with hf_hardattn.soft(model):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    try:
        assert torch.equal(logits(model), expected)
    finally:
        done.set()
        thread.join()


def test_a_recording_holds_the_selections_of_its_own_thread() -> None:
    model = vit("vision.inputs", budget=2)
    with hf_hardattn.record(model) as selections:
        thread = threading.Thread(target=logits, args=(model,))
        thread.start()
        thread.join()
        logits(model)
    assert len(selections) == 1


def test_blocks_of_soft_that_overlap_end_hard() -> None:
    model = vit("vision.inputs", budget=2)
    expected, first, second = logits(model), hf_hardattn.soft(model), hf_hardattn.soft(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), expected)


def test_an_unknown_execution_is_refused() -> None:
    model = vit("vision.inputs", budget=4)
    with pytest.raises(HardAttentionError, match="maskd"), hf_hardattn.execution(model, "maskd"):
        pass


def test_a_recorded_selection_can_be_replaced() -> None:
    model = vit("vision.inputs", budget=4)
    with hf_hardattn.record(model) as selections:
        logits(model)
    assert selections[0].replace(site="elsewhere").site == "elsewhere"
    assert selections[0].site == selections["vision.inputs"][0].site == "vision.inputs"


def test_what_is_recorded_as_dropped_is_not_computed_on_whatever_the_scores() -> None:
    """Scores of NaN, as a diverged training leaves them, may choose anything, but a recording must say what."""
    model, image = vit("vision.inputs", budget=4), pixels(1)
    with torch.no_grad():
        for parameter in hf_hardattn.selectors(model)["vision.inputs"].parameters():
            parameter.fill_(torch.nan)
    with allowing_refusal():
        with hf_hardattn.record(model) as selections:
            before = logits(model, {"pixel_values": image})
        kept = selections.kept(selections["vision.inputs"][0])[0, 0, 0, 1:].view(4, 4)
        dropped = (~kept).repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert torch.equal(logits(model, {"pixel_values": torch.where(dropped, image + 5.0, image)}), before)


# --------------------------------------------------------------------------------------------------------------- applying again


def test_applying_another_budget_keeps_trained_selectors() -> None:
    model = vit("vision.tokens.0", budget=0.5)
    before = {k: v.clone() for k, v in hf_hardattn.selectors(model)["vision.tokens.0"].named_parameters()}
    hf_hardattn.apply(model, {"sites": ["vision.tokens.0"], "budget": 0.25})
    after = dict(hf_hardattn.selectors(model)["vision.tokens.0"].named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


REFUSED: dict[str, dict[str, Any]] = {
    "an unknown site": {"sites": ["vision.nowhere"]},
    "a scorer per query at inputs": {"sites": ["vision.inputs"], "scorer": "attention"},
    "per_head at inputs": {"sites": ["vision.inputs"], "per_head": True},
    "share_selection at inputs": {"sites": ["vision.inputs"], "share_selection": True},
    "a gathered pathwise estimator": {"sites": ["vision.inputs"], "execution": "gathered"},
    "no glimpses": {"sites": ["vision.inputs"], "scorer": "recurrent", "scorer_options": {"glimpses": 0}},
    "a negative width": {"sites": ["vision.inputs"], "scorer": "mlp", "scorer_options": {"hidden": -1}},
    "monotonic at self": {"sites": ["vision.self.0"], "scorer": "query_key", "scorer_options": {"monotonic": True}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_apply_leaves_a_hard_model_as_it_was(what: str) -> None:
    model = vit("vision.inputs", budget=4)
    before, hard = logits(model), copy.deepcopy(model.config.hard_attention)
    with pytest.raises((HardAttentionError, RuntimeError)):
        hf_hardattn.apply(model, REFUSED[what])
    assert torch.equal(logits(model), before)
    assert list(hf_hardattn.selectors(model)) == ["vision.inputs"] and model.config.hard_attention == hard


# ------------------------------------------------------------------------------------------------------------- nothing is lost in silence


SILENT: dict[str, dict[str, Any]] = {
    "the penalty of hard_concrete": {"estimator": "hard_concrete"},
    "the entropy bonus": {"entropy_weight": 1.0},
    "self-distillation": {"self_distillation": 1.0},
    "the reward of reinforce": {"estimator": "reinforce"},
    "the teacher of distil": {"estimator": "distil"},
    "the choices of marginal": {"estimator": "marginal", "budget": 1},
    "the cost of looking on": {"scorer": "recurrent", "scorer_options": {"halting_cost": 0.1}},
}


@pytest.mark.parametrize("option", SILENT)
def test_a_term_that_the_loss_cannot_carry_is_announced(option: str) -> None:
    """Without labels a model returns no loss, as with the Trainer's label smoothing, and the terms do not reach the user's own."""
    model = vit("vision.tokens.0", **{"budget": 0.3, **SILENT[option]}).train()
    with pytest.warns(UserWarning, match="loss"):
        model(pixel_values=pixels())


def test_a_model_without_such_terms_is_silent_without_a_loss() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit("vision.tokens.0").train()(pixel_values=pixels())


def test_terms_that_the_loss_cannot_carry_are_added_by_hand() -> None:
    """What the warning recommends: the gradient of the penalty reaches the selector."""
    model = vit("vision.tokens.0", budget=0.3, estimator="hard_concrete").train()
    known = hf_hardattn.selectors(model)
    with pytest.warns(UserWarning, match="auxiliary_loss"), hf_hardattn.record(model) as selections:
        model(pixel_values=pixels())
    loss = hf_hardattn.auxiliary_loss(selections, known, None)
    assert loss is not None
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in known["vision.tokens.0"].scorer.parameters())


def trainer(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    data = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(pixels(8))]
    fixed = dict(per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    arguments = TrainingArguments(str(folder), **{**fixed, "max_steps": 3, "learning_rate": 1e-2, **options})
    return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


def test_label_smoothing_constrains_the_count_or_says_that_it_does_not(tmp_path: Path) -> None:
    model = vit("vision.tokens.0", budget=0.3, estimator="hard_concrete")
    (selector,) = hf_hardattn.selectors(model).values()

    def multipliers() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in selector.state_dict().items() if "multiplier" in name}

    before = multipliers()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(model, tmp_path, label_smoothing_factor=0.1).train()
    moved = any(not torch.equal(before[name], value) for name, value in multipliers().items())
    assert moved or any("loss" in str(w.message) and issubclass(w.category, UserWarning) for w in said)


class Interrupt(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_baseline_moves_again_after_an_interrupted_trainer(tmp_path: Path) -> None:
    model = vit("vision.inputs", budget=4, estimator="reinforce", baseline="moving_average")
    with contextlib.suppress(KeyboardInterrupt):
        trainer(model, tmp_path, hf_hardattn.HardAttentionCallback(), Interrupt()).train()
    model.train()
    (selector,) = hf_hardattn.selectors(model).values()
    before = selector.baseline.value.clone()  # of the interrupted training's only step
    model(**images()).loss.backward()
    assert not torch.equal(selector.baseline.value, before)


POISONS = {"a reward of NaN": torch.nan, "an infinite reward": torch.inf, "pixels of NaN": None}


@pytest.mark.parametrize("baseline", ["moving_average", "leave_one_out", "self_critical", "learned", "none"])
@pytest.mark.parametrize("poison", POISONS)
def test_training_recovers_from_one_step_that_is_not_finite(poison: str, baseline: str) -> None:
    """A GradScaler skips such a step; what baselines and estimators remember must not carry it on."""
    model = vit("vision.inputs", budget=0.5, estimator="reinforce", baseline=baseline).train()
    finite = []
    for step in range(6):
        bad, batch = step == 2, images(4)
        value = POISONS[poison]
        if value is None:
            batch["pixel_values"] = batch["pixel_values"] * torch.nan if bad else batch["pixel_values"]
        else:
            reward = torch.full((4,), value) if bad else torch.rand(4)
            hf_hardattn.set_reward(model, lambda inputs, output, reward=reward: reward)
        loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        finite.append(bool(loss.isfinite()))
    assert finite[:2] == [True] * 2 and finite[3:] == [True] * 3


# ----------------------------------------------------------------------------------------------------------------------- precision


AUTOCAST = {
    "linear": "vision.inputs",
    "mlp": "vision.inputs",
    "conv": "vision.inputs",
    "scout": "vision.inputs",
    "recurrent": "vision.inputs",
    "query_key": "vision.self.0",
    "attention": "vision.self.0",
    "cls_attention": "vision.tokens.0",
    "key_norm": "vision.tokens.0",
}


@pytest.mark.parametrize("scorer", AUTOCAST)
def test_scores_are_float32_under_autocast(scorer: str) -> None:
    """Not in name alone: scores that went through bfloat16 tie, and ties go to the lower index."""
    model = vit(AUTOCAST[scorer], scorer=scorer, budget=4)
    with torch.autocast("cpu", torch.bfloat16), hf_hardattn.record(model) as selections:
        logits(model)
    scores = selections[0].scores
    finite = scores[scores.isfinite()]
    assert scores.dtype is torch.float32 and not torch.equal(finite, finite.bfloat16().float())


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_half_precision_changes_no_choice(dtype: torch.dtype, scorer: str) -> None:
    """The first layer sees the same states with and without cache, so that any other choice is the cache's."""
    batch = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 40, seed=7)}
    for seed in range(8):
        model = t5("decoder.self.*", scorer=scorer).to(dtype)
        draw_selectors(model, seed)
        kept = []
        for use_cache in (True, False):
            with hf_hardattn.record(model) as selections:
                logits(model, {**batch, "use_cache": use_cache})
            kept.append(selections.kept(selections["decoder.self.0"][0]))
        assert torch.equal(*kept)


def test_large_scores_stay_finite_in_a_half_precision_cache() -> None:
    model = t5("decoder.self.*").half()
    draw_selectors(model, 2, std=1.5e4)
    largest = torch.finfo(torch.half).max
    for selector in hf_hardattn.selectors(model).values():  # a weight may be no larger, a score may
        for parameter in selector.parameters():
            parameter.detach().clamp_(-largest, largest)
    with hf_hardattn.record(model) as selections:
        logits(model, {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 12, seed=7), "use_cache": True})
    own = selections[0].scores[selections[0].valid.expand_as(selections[0].scores)]
    assert own.isfinite().all() and own.abs().max() > largest


def test_keeping_all_launches_no_kernel() -> None:
    from hf_hardattn.efficiency.host import count_kernels

    counts = []
    for model in (vit(), vit("vision.tokens.0", budget=1.0)):
        logits(model)
        counts.append(count_kernels(lambda model=model: logits(model)).total())
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------------------- one choice, every way


def test_scorer_cls_attention_chooses_the_same_masked_and_gathered() -> None:
    for seed in range(40):
        model = shaken(ViTForImageClassification, vit_config())
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        sites = {"vision.inputs": {"scorer": "linear"}, "vision.tokens.1": {}}
        harden(model, sites=sites, scorer="cls_attention", budget=0.4)
        kept = []
        for how in ("masked", "gathered"):
            with hf_hardattn.execution(model, how), hf_hardattn.record(model) as selections:
                logits(model, images(4))
            kept.append(selections.kept(selections["vision.tokens.1"][0]))
        assert torch.equal(*kept), f"seed {seed}"


def padded_texts(long: int = 30, short: int = 7) -> dict[str, Tensor]:
    source, mask = ids(2, long), torch.ones(2, long, dtype=torch.long)
    source[:, -1], source[1, short - 1], source[1, short:], mask[1, short:] = 1, 1, 0, 0
    return {"input_ids": source, "attention_mask": mask, "labels": ids(2, 4, seed=6)}


def assert_same_choice(kept: list[Tensor], scores: Tensor) -> None:
    """The same positions, but for those whose scores tie up to rounding, which differs with the shape of a batch."""
    exchanged = scores.expand_as(kept[0])[kept[0] != kept[1]]
    assert not len(exchanged) or float(exchanged.max() - exchanged.min()) <= TOLERANCE


ROW_ALONE: dict[str, dict[str, Any]] = {
    "recurrent": {"scorer": "recurrent", "budget": 0.3},
    "recurrent, 8 glimpses": {"scorer": "recurrent", "budget": 0.3, "scorer_options": {"glimpses": 8}},
    "linear": {"scorer": "linear"},
    "mlp": {"scorer": "mlp"},
    "key_norm": {"scorer": "key_norm"},
    "query_key": {"scorer": "query_key"},
    "attention": {"scorer": "attention"},
}


@pytest.mark.parametrize("site", ["encoder.tokens.0", "encoder.self.0"])
@pytest.mark.parametrize("name", ROW_ALONE)
def test_a_row_keeps_the_same_alone_as_beside_a_longer_one(name: str, site: str) -> None:
    if site == "encoder.tokens.0" and name in ("query_key", "attention"):
        site = "encoder.self.1"  # they choose per query, which only attentions can
    batch = padded_texts()
    alone = {key: value[1:, :7] if key != "labels" else value[1:] for key, value in batch.items()}
    for seed in range(10):
        model = t5(site, **ROW_ALONE[name])
        draw_selectors(model, seed)
        kept = []
        for given in (batch, alone):
            with hf_hardattn.record(model) as selections:
                logits(model, given)
            kept.append(selections.kept(selections[site][0])[-1:, :, :7, :7])
        assert_same_choice(kept, selections[site][0].scores)


def test_scorer_recurrent_chooses_the_same_masked_and_gathered_behind_other_sites() -> None:
    for seed in range(20):
        sites = {"vision.inputs": {}, "vision.tokens.0": {}, "vision.self.1": {"scorer": "recurrent"}}
        model = harden(vit(), sites=sites, budget=0.5)
        draw_selectors(model, seed)
        kept = []
        for how in ("masked", "gathered"):
            with hf_hardattn.execution(model, how), hf_hardattn.record(model) as selections:
                logits(model)
            kept.append(selections.kept(selections["vision.self.1"][0]))
        assert torch.equal(*kept), f"seed {seed}"


KEYS_READ = {
    "linear": {"budget": 3},
    "mlp": {"budget": 3, "scorer": "mlp"},
    "recurrent": {"budget": 3, "scorer": "recurrent"},
    "per head": {"budget": 3, "per_head": True},
    "shared": {"budget": 3, "share_selection": True},
}


@pytest.mark.parametrize("name", KEYS_READ)
@pytest.mark.parametrize("mode", ["evaluation", "sampled", "training"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_generation_reads_the_kept_keys_at_every_token(name: str, mode: str, use_cache: bool) -> None:
    """3 keys and the place of ``</s>``, not all 12, whether a choice is the likeliest or drawn."""
    model = t5("decoder.cross.*", config={"attn_implementation": "eager"}, **KEYS_READ[name]).train(mode == "training")
    around = hf_hardattn.sampled(model) if mode == "sampled" else contextlib.nullcontext()
    options = dict(max_new_tokens=4, min_new_tokens=4, output_attentions=True, return_dict_in_generate=True)
    with around:
        made = model.generate(ids(1, 12), use_cache=use_cache, **options)
    assert [int((step[0][0, 0, -1] > 1e-9).sum()) for step in made.cross_attentions] == [4] * 4


@pytest.mark.parametrize("site", ["decoder.cross.*", "encoder.tokens.0"])
def test_cross_attentions_keep_their_width_while_generating(site: str) -> None:
    model = t5(site, budget=0.5, config={"attn_implementation": "eager"})
    options = dict(max_new_tokens=3, min_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    made = model.generate(ids(1, 12), **options)
    assert len({step[0].shape[-1] for step in made.cross_attentions}) == 1


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_encoder_states_of_another_mode_are_read_whole(ratio: float) -> None:
    model, batch = t5("encoder.tokens.0", budget=ratio), {"decoder_input_ids": ids(1, 3, seed=6)}
    with torch.no_grad(), hf_hardattn.soft(model):
        states = model.encoder(ids(1, 16))
        expected = logits(model, {**batch, "encoder_outputs": states})
    assert differ(logits(model, {**batch, "encoder_outputs": states}), expected) <= TOLERANCE


@pytest.mark.parametrize("site", ["encoder.self.*", "encoder.tokens.0", "encoder.inputs"])
def test_documents_packed_in_one_row_stay_apart_or_are_refused(site: str) -> None:
    """A block-diagonal mask: each document gets what it gets alone, with the same rows kept. ``</s>`` and the last row are always kept."""
    model = shaken(T5EncoderModel, T5Config(**T5_SIZES, is_encoder_decoder=False))
    harden(model, sites=[site], budget=0.5)
    sites = list(hf_hardattn.selectors(model))
    row, keep = ids(1, 12), torch.tensor([[1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1]]).bool()
    mask = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool()[None, None]

    def run(kept: Tensor, **batch: Tensor) -> Tensor:
        with torch.no_grad(), hf_hardattn.replay(model, dict.fromkeys(sites, kept)):
            return model(**batch).last_hidden_state

    alone = torch.cat([run(keep[:, part], input_ids=row[:, part]) for part in (slice(0, 6), slice(6, 12))], 1)
    with allowing_refusal():
        packed = run(keep, input_ids=row, attention_mask=mask)
        computed = keep[0] if "self" not in site else torch.ones(12, dtype=torch.bool)
        assert differ(packed[0, computed], alone[0, computed]) <= TOLERANCE


def test_documents_packed_in_one_row_stay_apart_when_all_is_kept() -> None:
    row, mask = ids(1, 12), torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool()[None, None]
    stock = shaken(T5EncoderModel, T5Config(**T5_SIZES, is_encoder_decoder=False))
    hard = harden(copy.deepcopy(stock), sites=["encoder.self.*"], budget=1.0)
    with torch.no_grad(), allowing_refusal():
        found, expected = (model(input_ids=row, attention_mask=mask).last_hidden_state for model in (hard, stock))
        assert differ(found, expected) <= TOLERANCE


def test_scorer_conv_takes_its_grid_from_the_image() -> None:
    """2 x 8 patches are no square of 16: a patch is felt by its neighbours and by no other."""
    model = vit("vision.inputs", scorer="conv", budget=4, config={"image_size": (16, 64)})
    image = pixels(1, (16, 64))
    changed = image.clone()
    changed[..., 0:8, 24:32] += 3.0  # the patch in row 0, column 3
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
        with hf_hardattn.record(model) as selections:
            model(pixel_values=image)
            model(pixel_values=changed)
    before, after = (choice.scores[0, 0, 0, 1:].view(2, 8) for choice in selections["vision.inputs"])
    felt = (before - after).abs().gt(1e-5).nonzero().tolist()
    assert felt == [[row, column] for row in (0, 1) for column in (2, 3, 4)]


# ------------------------------------------------------------------------------------------------------------------- training at the edges


MONOTONIC: dict[str, dict[str, Any]] = {
    "simple": {"estimator": "simple"},
    "straight_through": {"estimator": "straight_through"},
    "reinforce": {"estimator": "reinforce", "baseline": "none"},
    "per head": {"per_head": True},
    "masked": {"execution": "masked"},
    "soft rate": {"soft_rate": 0.3},
    "variational": {"estimator": "variational"},
    "adaptive temperature": {"estimator": "straight_through", "backward_temperature": "adaptive"},
}


def monotonic_gradients(**options: Any) -> list[dict[str, Tensor]]:
    """Of a training step with the cache that T5's configuration asks for, and of one without."""
    gradients = []
    for changes in ({}, {"use_cache": False}):
        hard = {"scorer": "query_key", "scorer_options": {"monotonic": True}, "budget": 1, **options}
        model = t5("decoder.cross.*", **hard).train()
        torch.manual_seed(3)
        model(**texts(), **changes).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return gradients


@pytest.mark.parametrize("name", MONOTONIC)
def test_monotonic_scorers_train_with_the_cache_that_t5_makes(name: str) -> None:
    with_cache, without = monotonic_gradients(**MONOTONIC[name])
    assert with_cache.keys() == without.keys()
    assert all(differ(with_cache[name], without[name]) <= TOLERANCE for name in without)


def test_monotonic_scorers_train_an_inference_network() -> None:
    gradients, _ = monotonic_gradients(estimator="variational")
    learning = [name for name, gradient in gradients.items() if "posterior.target_weight" in name and gradient.any()]
    assert len(learning) == 2


ESTIMATORS = (
    *("simple", "straight_through", "gumbel", "gumbel_rao", "reinmax", "entmax", "sparsemax"),
    *("reinforce", "sfess", "variational", "imle", "perturbed", "hard_concrete"),
)


@pytest.mark.parametrize("site", ["encoder.inputs", "encoder.tokens.0", "encoder.self.*", "decoder.cross.*"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_one_token_wide_trains_as_stock(estimator: str, site: str) -> None:
    """An empty text is ``</s>``: nothing to choose, so the logits are stock's."""
    batch = {"input_ids": torch.tensor([[1], [1]]), "labels": torch.tensor([[4, 1], [5, 1]])}
    expected = logits(t5().train(), batch)
    output = t5(site, estimator=estimator, baseline="leave_one_out").train()(**batch)
    output.loss.backward()
    assert output.loss.isfinite() and differ(output.logits.detach(), expected) <= TOLERANCE


def test_marginal_trains_on_a_batch_one_token_wide() -> None:
    batch = {"input_ids": torch.tensor([[1], [1]]), "labels": torch.tensor([[4, 1], [5, 1]])}
    model = t5("decoder.cross.1", estimator="marginal", budget=1).train()
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("scorer", ["linear", "mlp", "recurrent", "key_norm"])
def test_a_batch_one_token_wide_is_evaluated_as_stock(scorer: str) -> None:
    batch = {"input_ids": torch.tensor([[1], [1]]), "labels": torch.tensor([[4, 1], [5, 1]])}
    assert differ(logits(t5("encoder.tokens.0", scorer=scorer), batch), logits(t5(), batch)) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"glimpses": 8}, {"halting_cost": 0.1}, {"monotonic": True}])
@pytest.mark.parametrize("estimator", ["simple", "reinforce"])
def test_scorer_recurrent_trains_on_a_batch_one_token_wide(estimator: str, options: dict[str, Any]) -> None:
    batch = {"input_ids": torch.tensor([[1], [1]]), "labels": torch.tensor([[4, 1], [5, 1]])}
    model = t5("encoder.tokens.0", scorer="recurrent", scorer_options=options, estimator=estimator).train()
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite() and differ(output.logits, logits(t5().train(), batch)) <= TOLERANCE


def test_an_empty_text_is_generated_from() -> None:
    model = t5("encoder.tokens.0", "decoder.cross.*")
    assert model.generate(torch.tensor([[1], [1]]), max_new_tokens=3, min_new_tokens=3).shape == (2, 4)


@pytest.mark.parametrize("sites", [["encoder.inputs"], ["encoder.tokens.0", "decoder.cross.*"], ["encoder.self.*"]])
def test_a_row_of_padding_alone_leaves_the_others_as_stock(sites: list[str]) -> None:
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[2] = 0
    batch = {"input_ids": ids(4, 9), "attention_mask": mask, "labels": ids(4, 4, seed=6)}
    others = torch.tensor([0, 1, 3])
    found, expected = logits(t5(*sites, budget=1000), batch), logits(t5(), batch)
    assert found.isfinite().all() and differ(found[others], expected[others]) <= TOLERANCE


RELAXED: dict[str, dict[str, Any]] = {
    "entmax": {"estimator": "entmax", "estimator_options": {"hard": False}},
    "sparsemax": {"estimator": "sparsemax", "estimator_options": {"hard": False}},
    "perturbed": {"estimator": "perturbed", "estimator_options": {"hard": False}},
}


@pytest.mark.parametrize("name", RELAXED)
def test_relaxed_estimators_train_at_two_sites_that_drop_rows(name: str) -> None:
    model = vit("vision.tokens.0", "vision.tokens.1", budget=0.3, **RELAXED[name]).train()
    loss = model(**images()).loss
    loss.backward()
    assert loss.isfinite()


MIXED: dict[str, dict[str, Any]] = {
    "reinforce before simple": {"encoder.tokens.0": {"estimator": "reinforce"}, "encoder.tokens.1": {}},
    "simple before reinforce": {"encoder.tokens.0": {}, "encoder.tokens.1": {"estimator": "reinforce"}},
    "random before simple": {"encoder.inputs": {"scorer": "random"}, "encoder.tokens.0": {}},
}


@pytest.mark.parametrize("name", MIXED)
def test_sites_that_train_gathered_and_masked_mix_or_are_refused_when_attached(name: str) -> None:
    model = t5()
    try:
        harden(model, sites=MIXED[name], estimator="simple", budget=0.5)
    except HardAttentionError:
        return
    loss = model.train()(**padded_texts()).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("site", ["vision.inputs", "vision.self.*"])
@pytest.mark.parametrize("place", ["embeddings.patch_embedding", "encoder.layers.0.self_attn.qkv"])
def test_a_hook_on_a_projection_can_replace_what_it_computes(site: str, place: str) -> None:
    model = blip(site, budget=0.5, scorer="first")
    projection: Any = model.vision_model.get_submodule(place)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model.vision_model(pixel_values=pixels).last_hidden_state
        hook = projection.register_forward_hook(lambda module, args, output: output * 2)
        doubled = model.vision_model(pixel_values=pixels).last_hidden_state
        hook.remove()
        for parameter in projection.parameters():
            parameter.mul_(2)
        expected = model.vision_model(pixel_values=pixels).last_hidden_state
    assert not torch.allclose(plain, doubled)
    torch.testing.assert_close(doubled, expected)
