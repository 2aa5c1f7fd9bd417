"""Nothing of a hard model is left on the processor: everywhere on PyTorch's `meta` device, which holds no numbers, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from test_common_behaviour import PLACES, example, first
from torch import Tensor

import hf_hardattn
from hf_hardattn import registry

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
place = pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p[1]}-{p[2]}")
# marginal is for targets, by GRU backbones; T5 has no classes for cropr
ESTIMATORS = [name for name in registry.names("estimators") if name not in ("marginal", "cropr")]
TRANSFORMERS_WAITS = ("BlipForImageTextRetrieval",)  # for the mask that it makes itself


def moved(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The batch on a device, without the mask of its padding: Transformers reads that back to the host."""
    return {name: column.to(device) for name, column in batch.items() if name != "attention_mask"}


def learns(made, device: str) -> list[Tensor]:
    """A training step on a device; the losses of two micro-batches, for running baselines."""
    made.model.to(device).train()
    batch = moved(made.batch, device)
    losses = [made.model(**batch).loss for _ in range(2)]
    sum(losses).backward()
    return losses


VIT_TOKENS = ("vit", "ViTForImageClassification", "vision.tokens.*")
T5_CROSS = ("t5", "T5ForConditionalGeneration", "decoder.cross.*")


@pytest.mark.parametrize(
    ("place", "estimator"),
    [*((VIT_TOKENS, name) for name in ESTIMATORS), *((T5_CROSS, name) for name in ("simple", "reinforce"))],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_every_estimator_makes_its_tensors_on_the_models_device(place, estimator):
    made = example(place, estimator=estimator)
    losses = learns(made, "meta")
    assert all(loss.device.type == "meta" for loss in losses)


@place
@pytest.mark.parametrize("budget", [0.5, 3])
def test_every_site_makes_its_tensors_on_the_models_device(place, budget):
    if place[1] in TRANSFORMERS_WAITS:
        return
    made = example(place, budget=budget)
    assert learns(made, "meta")[0].device.type == "meta"
    made.model.eval()
    with torch.inference_mode(), hf_hardattn.record(made.model) as selections:
        made.model(**moved(made.batch, "meta"))
    assert {selection.mask.device.type for selection in selections} == {"meta"}


@pytest.mark.gpu
@needs_gpu
@place
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_a_gpu_chooses_and_computes_what_the_processor_does(place, budget):
    made = example(place, budget=budget)
    expected = first(made)
    made.model.cuda()
    made.batch = {name: column.cuda() for name, column in made.batch.items()}
    torch.testing.assert_close(first(made).cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@needs_gpu
@place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_nothing_waits_for_the_device(place, dtype):
    """PyTorch raises at any operation that would make the host wait."""
    if place[1] in TRANSFORMERS_WAITS:
        return
    made = example(place, budget=3)
    made.model.to("cuda", dtype)
    batch = moved(made.batch, "cuda")
    batch = {name: column.to(dtype) if column.is_floating_point() else column for name, column in batch.items()}
    with torch.inference_mode():
        made.model(**batch)  # what is made once is made here
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = made.model(**batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in output.values() if isinstance(value, Tensor))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("place", [place for place in PLACES if place[0] == "vit"], ids=lambda p: f"{p[1]}-{p[2]}")
def test_a_cuda_graph_replays_other_choices(place):
    """A captured forward pass chooses anew for what lies in its inputs: shapes are fixed, positions are not."""
    made = example(place, budget=3)
    made.model.cuda()
    batch = moved(made.batch, "cuda")
    batch.pop("labels", None)
    made.batch = batch
    other = torch.randn_like(batch["pixel_values"])
    first(made)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        output = made.model(**batch)
    captured = next(value for name, value in output.items() if name != "loss")
    batch["pixel_values"].copy_(other)
    graph.replay()
    torch.testing.assert_close(captured, first(made))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("place", [PLACES[0], PLACES[6]], ids=lambda p: p[1])
def test_every_estimator_trains_on_a_gpu(place, estimator):
    made = example(place, estimator=estimator)
    assert all(loss.isfinite() for loss in learns(made, "cuda"))
    scorers = [p for s in hf_hardattn.selectors(made.model).values() for p in s.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scorers)
