"""Law 12: every public verb takes a model however it is wrapped, or refuses by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed
from cases import HEADS, Example, all_sites, close, harden, run, stock, train_loss
from peft import LoraConfig, get_peft_model
from rounding import MANY, SOME, assert_rounded
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.models import family_of

FIRST_HEADS = list(dict(reversed(HEADS)).items())
HEAD = ("vit", "ViTForImageClassification")
SITES = ("vision.inputs", "vision.self.1", "vision.tokens.1")
CONFIG: dict[str, Any] = {"sites": list(SITES), "budget": 3}


# ---------------------------------------------------------------------------------------------------------------------- the wrappers


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """A process group of one, which DDP and FSDP2 ask for."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def peft(example: Example) -> Any:
    """LoRA beside the first projection of each attention; the selectors are trained whole."""
    model = example.model
    inside = {id(selector) for selector in hf_hardattn.selectors(model).values()}
    saved = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in inside})
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    target = next(name for name in ("q_proj", "query", "q", "qkv", "fc1") if name in names)
    return get_peft_model(model, LoraConfig(target_modules=[target], modules_to_save=saved)).eval()


def ddp(example: Example) -> Any:
    return DistributedDataParallel(example.model)


def fsdp2(example: Example) -> Any:
    """Layer by layer, then what is left: PyTorch's own idiom."""
    for tower in family_of(example.model).towers(example.model).values():
        for layer in tower.layers:
            fully_shard(layer)
    return fully_shard(example.model)


def torch_compile(example: Example) -> Any:
    torch._dynamo.reset()
    return warm(torch.compile(example.model, backend="eager"), example)


def model_compile(example: Example) -> Any:
    torch._dynamo.reset()
    example.model.compile(backend="eager")
    return warm(example.model, example)


def warm(compiled: Any, example: Example) -> Any:
    """A model that ran is not compiled again for the same call."""
    for _ in range(2):  # the first call with labels notes the kind of problem in the configuration
        run(Example(compiled, example.batch))
    return compiled


def cpu_offload(example: Example) -> Any:
    return accelerate.cpu_offload(example.model, execution_device="cpu")


def dispatch(example: Example) -> Any:
    return accelerate.dispatch_model(example.model, {"": "cpu"}, force_hooks=True)


WRAPPERS: dict[str, Callable[[Example], Any]] = {
    "PEFT": peft,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "torch.compile": torch_compile,
    "model.compile": model_compile,
    "cpu_offload": cpu_offload,
    "dispatch": dispatch,
}
CHEAP = [name for name in WRAPPERS if "compile" not in name]


# ------------------------------------------------------------------------------------------------------------------------- the verbs


@dataclass
class Wrapped:
    """A hard model in a wrapper, with what it and stock give unwrapped."""

    model: Any
    batch: dict[str, Any]
    hard: dict[str, torch.Tensor]
    soft: dict[str, torch.Tensor]
    folder: Any = None

    def run(self) -> dict[str, torch.Tensor]:
        return run(Example(self.model, self.batch))


def wrapped(wrapper: str, architecture: str = HEAD[0], head: str = HEAD[1], **config: Any) -> Wrapped:
    example = stock(architecture, head)
    soft = run(example)
    harden(example.model, {**(CONFIG if architecture == "vit" else {"sites": ["*"], "budget": 2}), **config})
    hard = run(example)
    model = WRAPPERS[wrapper](example)
    return Wrapped(model, example.batch, hard, soft)


def the_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to the rounding of another order of sums: sharded and compiled code may choose one."""
    close(found, expected, SOME)


def differs(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return not torch.allclose(found["logits"], expected["logits"], rtol=0, atol=1e-3)


def soft(it: Wrapped) -> None:
    with hf_hardattn.soft(it.model):
        the_same(it.run(), it.soft)
    the_same(it.run(), it.hard)


def sampled(it: Wrapped) -> None:
    with hf_hardattn.sampled(it.model):
        assert any(differs(it.run(), it.hard) for _ in range(5))
    the_same(it.run(), it.hard)


def execution(it: Wrapped) -> None:
    with hf_hardattn.execution(it.model, "masked"), hf_hardattn.record(it.model) as selections:
        the_same(it.run(), it.hard)
    assert all(selection.masked for selection in selections)


def status(it: Wrapped) -> None:
    said = hf_hardattn.status(it.model)
    assert all(site in said for site in SITES) and "gathered" in said
    with hf_hardattn.soft(it.model):
        assert "gathered" not in hf_hardattn.status(it.model)


def record(it: Wrapped) -> None:
    with hf_hardattn.record(it.model) as selections:
        it.run()
    assert sorted(selections.sites) == list(SITES) and len(selections) == 3


def replay(it: Wrapped) -> None:
    with hf_hardattn.record(it.model) as before:
        it.run()
    mask = before["vision.inputs"][0].mask.flip(-1)[:, 0, 0]
    with hf_hardattn.replay(it.model, {"vision.inputs": mask}), hf_hardattn.record(it.model) as selections:
        assert differs(it.run(), it.hard)
    assert torch.equal(selections["vision.inputs"][0].mask[..., 1:], mask[:, None, None, 1:])
    the_same(it.run(), it.hard)


def verify(it: Wrapped) -> None:
    report = hf_hardattn.verify(it.model, it.batch)
    assert report.parity_ok and sorted(site.site for site in report.sites) == list(SITES)


def diagnose(it: Wrapped) -> None:
    found = hf_hardattn.diagnose(it.model, it.batch, ["simple"], draws=2, limit=1)
    assert {row.site for row in found.rows} == set(SITES) and not any(row.failed for row in found.rows)
    the_same(it.run(), it.hard)


def find_collapse(it: Wrapped) -> None:
    assert all(finding.site in SITES for finding in hf_hardattn.find_collapse(it.model, it.batch))
    the_same(it.run(), it.hard)


def selectors(it: Wrapped) -> None:
    assert sorted(hf_hardattn.selectors(it.model)) == list(SITES)


def save(it: Wrapped) -> None:
    adapter = hasattr(it.model, "peft_config")
    hf_hardattn.save(it.model, it.folder, base_model="me/base" if adapter else None)
    if adapter:
        saved = load_file(it.folder / "adapter_model.safetensors")
        assert sum("selector.scorer" in name for name in saved) >= len(SITES)
    else:
        the_same(run(Example(hf_hardattn.load(it.folder).eval(), it.batch)), it.hard)


def set_step(it: Wrapped) -> None:
    hf_hardattn.set_step(it.model, 7, 10)
    assert all((selector.step, selector.steps) == (7, 10) for selector in hf_hardattn.selectors(it.model).values())


def freeze_backbone(it: Wrapped) -> None:
    before = {name for name, p in it.model.named_parameters() if p.requires_grad}
    with hf_hardattn.freeze_backbone(it.model):
        trained = [name for name, p in it.model.named_parameters() if p.requires_grad]
        assert trained and all("selector" in name for name in trained)
    assert {name for name, p in it.model.named_parameters() if p.requires_grad} == before


def set_budget(it: Wrapped) -> None:
    """As a model that was made with that budget, and back again."""
    hf_hardattn.set_budget(it.model, 5)
    with hf_hardattn.record(it.model) as selections:
        it.run()
    assert [s.mask.sum(-1).max().item() for s in selections] == [6, 6, 6]  # and CLS
    assert differs(it.run(), it.hard)
    hf_hardattn.set_budget(it.model, 3)
    the_same(it.run(), it.hard)


def set_reward(it: Wrapped) -> None:
    called = []
    hf_hardattn.apply(it.model, {**CONFIG, "estimator": "reinforce", "baseline": "none"})
    hf_hardattn.set_reward(it.model, lambda inputs, output: (called.append(1), torch.zeros(3))[1])
    it.model.train()
    it.model(**it.batch)
    assert called
    hf_hardattn.set_reward(it.model, None)
    called.clear()
    it.model(**it.batch)
    assert not called


def remove(it: Wrapped) -> None:
    assert hf_hardattn.remove(it.model) is it.model
    the_same(it.run(), it.soft)
    assert not hf_hardattn.selectors(it.model)


def apply(it: Wrapped) -> None:
    """Another configuration: one site stays with its selector, the others go."""
    kept = hf_hardattn.selectors(it.model)["vision.tokens.1"]
    assert hf_hardattn.apply(it.model, {"sites": ["vision.tokens.1"], "budget": 3}) is it.model
    assert hf_hardattn.selectors(it.model) == {"vision.tokens.1": kept}
    with hf_hardattn.record(it.model) as selections:
        found = it.run()
    assert selections.sites == ["vision.tokens.1"]
    the_same(it.run(), found)
    assert differs(found, it.hard)


READERS = {
    verb.__name__: verb
    for verb in (
        *(soft, sampled, execution, status, record, replay, verify, diagnose, find_collapse, selectors, save),
        *(set_step, freeze_backbone),
    )
}
WRITERS = {verb.__name__: verb for verb in (set_budget, set_reward, remove, apply)}
# what a wrapper makes impossible, and the words that say so
REFUSED = {
    ("diagnose", "FSDP2"): "is sharded by FSDP2; diagnose needs unsharded weights",
    ("find_collapse", "FSDP2"): "is sharded by FSDP2; find_collapse needs unsharded weights",
    ("save", "FSDP2"): "is sharded by FSDP2; save needs unsharded weights",
    ("diagnose", "cpu_offload"): "is offloaded, and so not in memory between calls; diagnose needs it there",
}

_shared: dict[str, Wrapped] = {}


def check(verb: Callable[[Wrapped], None], it: Wrapped, wrapper: str) -> None:
    refused = REFUSED.get((verb.__name__, wrapper))
    if refused is None:
        verb(it)
    else:
        with pytest.raises(HardAttentionError, match=refused):
            verb(it)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("verb", READERS)
def test_a_verb_that_reads_reaches_through_a_wrapper(verb, wrapper, tmp_path):
    if wrapper not in _shared:  # none of these verbs may change it
        _shared[wrapper] = wrapped(wrapper)
    _shared[wrapper].folder = tmp_path
    check(READERS[verb], _shared[wrapper], wrapper)


@pytest.mark.parametrize(
    ("verb", "wrapper"),
    [
        pytest.param(verb, wrapper, marks=() if wrapper in CHEAP else pytest.mark.slow)
        for verb in WRITERS
        for wrapper in WRAPPERS
        if wrapper != "model.compile" or verb == "apply"  # found like torch.compile; each compiles anew
    ],
)
def test_a_verb_that_writes_reaches_through_a_wrapper(verb, wrapper):
    check(WRITERS[verb], wrapped(wrapper), wrapper)


@pytest.mark.parametrize("wrapper", CHEAP)
@pytest.mark.parametrize(("architecture", "head"), FIRST_HEADS)
def test_every_family_runs_in_every_wrapper(architecture, head, wrapper):
    if wrapper == "cpu_offload" and architecture == "siglip":
        with pytest.raises(RuntimeError, match="meta"):  # nn.MultiheadAttention reads a weight past its own module
            run(Example(cpu_offload(stock(architecture, head)), stock(architecture, head).batch))
        return
    it = wrapped(wrapper, architecture, head)
    the_same(it.run(), it.hard)
    with hf_hardattn.record(it.model) as selections:
        it.run()
    assert selections.sites and set(selections.sites) == set(hf_hardattn.selectors(it.model))
    with hf_hardattn.soft(it.model):
        found = it.run()
    close(found, it.soft, MANY if architecture == "blip" else SOME)  # stock BLIP computes attention eagerly
    hf_hardattn.remove(it.model)
    the_same(it.run(), it.soft)


@pytest.mark.parametrize("wrapper", CHEAP)
def test_a_model_is_made_hard_inside_its_wrapper(wrapper):
    example = stock(*HEAD)
    expected = run(Example(harden(copy.deepcopy(example.model), CONFIG), example.batch))
    model = WRAPPERS[wrapper](example)
    hf_hardattn.apply(model, CONFIG)
    torch.manual_seed(1)
    for selector in hf_hardattn.selectors(model).values():
        for parameter in selector.parameters():
            nn.init.normal_(parameter, std=0.5)
    the_same(run(Example(model, example.batch)), expected)


@pytest.mark.parametrize("estimator", ["simple", "reinforce"])  # one trains masked, the other gathered
@pytest.mark.parametrize("wrapper", ["PEFT", "DDP", "FSDP2", "dispatch"])
@pytest.mark.parametrize(("architecture", "head"), FIRST_HEADS)
def test_a_wrapped_model_trains_with_the_gradients_of_the_model_alone(architecture, head, wrapper, estimator):
    alone, example = (stock(architecture, head) for _ in range(2))
    for each in (alone, example):
        harden(each.model, {"sites": ["*"], "budget": 2, "estimator": estimator, "baseline": "none"})
    wrapper = Example(WRAPPERS[wrapper](example), example.batch)
    for each in (alone, wrapper):
        train_loss(each).backward()
    found, expected = (hf_hardattn.selectors(each.model) for each in (wrapper, alone))
    for site in expected:
        for (name, one), other in zip(found[site].named_parameters(), expected[site].parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if other.grad is not None:
                gradient = one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad
                assert_rounded(gradient, other.grad, MANY, f"{site} {name}")


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_selectors_made_inside_a_wrapper_that_will_not_average_them_are_announced(wrapper, monkeypatch):
    example = stock(*HEAD)
    model = WRAPPERS[wrapper](example)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    with pytest.warns(UserWarning, match=f"created after {wrapper} had wrapped .*Call apply\\(\\) first"):
        hf_hardattn.apply(model, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_hardattn.set_budget(model, 2)  # makes none


def test_a_pipeline_is_hard_and_its_model_is_found():
    from PIL import Image
    from transformers import ViTImageProcessor, pipeline

    example = stock(*HEAD, num_channels=3)
    harden(example.model, CONFIG)
    processor = ViTImageProcessor(size={"height": 12, "width": 12})
    pipe = pipeline("image-classification", model=example.model, image_processor=processor)
    image = Image.effect_noise((12, 12), 60).convert("RGB")
    with hf_hardattn.record(pipe.model) as selections:
        hard = pipe(image)
    assert sorted(selections.sites) == list(SITES)
    with hf_hardattn.soft(pipe):  # the pipeline itself serves too
        assert pipe(image) != hard
    assert sorted(hf_hardattn.selectors(pipe)) == list(SITES) and all_sites(pipe.model)
    hf_hardattn.remove(pipe)
    assert pipe(image) != hard and not hf_hardattn.selectors(pipe.model)


@pytest.mark.parametrize(
    "verb",
    [
        hf_hardattn.remove,
        hf_hardattn.selectors,
        hf_hardattn.status,
        lambda model: hf_hardattn.apply(model, CONFIG),
        lambda model: hf_hardattn.soft(model).__enter__(),
        lambda model: hf_hardattn.sampled(model).__enter__(),
        lambda model: hf_hardattn.execution(model, "masked").__enter__(),
        lambda model: hf_hardattn.record(model).__enter__(),
        lambda model: hf_hardattn.set_step(model, 1),
        lambda model: hf_hardattn.set_budget(model, 0.5),
        lambda model: hf_hardattn.set_reward(model, None),
        lambda model: hf_hardattn.freeze_backbone(model).__enter__(),
        lambda model: hf_hardattn.verify(model, {}),
        lambda model: hf_hardattn.diagnose(model, {}),
        lambda model: hf_hardattn.find_collapse(model, {}),
    ],
)
def test_what_is_no_model_is_refused_by_name(verb):
    with pytest.raises(HardAttentionError, match="str is not a model"):
        verb("google/vit-base-patch16-224")
