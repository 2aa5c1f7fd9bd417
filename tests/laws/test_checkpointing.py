"""Law 9: under gradient checkpointing the selection is replayed, not drawn again; ranks draw different, reproducible noise."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ESTIMATORS, Case, cases, hard, head_places, train_loss
from rounding import SOME, tolerance
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_hardattn

HERE = Path(__file__).parent


def gradients(example):
    example.model.zero_grad()
    loss = train_loss(example)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in example.model.named_parameters()}


CASES = cases(("linear", "random"), ESTIMATORS, (2, 0.5, "top_p:0.6"))


@pytest.mark.parametrize(("case", "use_reentrant"), [(c, bool(n % 2)) for n, c in enumerate(CASES)], ids=str)
def test_checkpointing_changes_no_gradient(case, use_reentrant):
    example = hard(case, temperature=0.7, entropy_weight=0.1)
    loss, expected = gradients(copy.deepcopy(example))  # a copy: an adaptive estimator moves with each backward pass
    example.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again, found = gradients(example)
    # rewards divided by the spread of their group (grpo) carry their rounding enlarged as much
    rtol = 1e-4 if case.estimator == "grpo" else 1e-5
    torch.testing.assert_close(again, loss, rtol=rtol, atol=1e-6)
    # of the largest gradient: that of a bias is zero for laws that ignore a shift, up to rounding
    scale = max(1.0, *(gradient.abs().max().item() for gradient in expected.values() if gradient is not None))
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            atol = scale * tolerance(gradient.dtype, (30 if case.estimator == "grpo" else 3) * SOME)
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_reentry_is_left_out_where_checkpointing_is_enabled():
    """Before any call: a layer's function may be wrapped by then, and its keywords no longer be seen."""
    model = hard(next(case for case in CASES if case.place.architecture == "vit")).model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and not any(layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers)


@pytest.mark.parametrize(("head", "place"), head_places())
@pytest.mark.parametrize("scorer", ["linear", "random"])
def test_training_is_reproducible_and_explores(head, place, scorer):
    example = hard(Case(place, head, scorer, "reinforce", 2), baseline="none")
    masks = []
    for seed in (3, 3, 4):
        with hf_hardattn.record(example.model) as selections:
            train_loss(example, seed)
        masks.append([s.mask for s in selections])
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))


RANK = """
import sys, torch
sys.path.insert(0, {here!r})
import torch.distributed as dist
from cases import Case, PLACES, hard, train_loss
import hf_hardattn
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
place = next(p for p in PLACES if p.architecture == "vit" and p.kind == "inputs")
masks = {{}}
for scorer, estimator in (("linear", "reinforce"), ("linear", "simple"), ("linear", "gumbel"), ("random", "straight_through")):
    example = hard(Case(place, "ViTForImageClassification", scorer, estimator, 3))
    for turn in range(2):
        with hf_hardattn.record(example.model) as selections:
            train_loss(example)
        masks[scorer, estimator, turn] = selections[0].mask
torch.save(masks, out + str(rank))
dist.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_ranks_with_the_same_seed_draw_different_noise(tmp_path):
    code = RANK.format(here=str(HERE))
    arguments = [str(tmp_path / "store"), str(tmp_path / "masks")]
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), *arguments]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(f"{tmp_path}/masks{rank}") for rank in range(2))
    for scorer, estimator, _ in first:
        assert torch.equal(first[scorer, estimator, 0], first[scorer, estimator, 1])  # reproducible
        assert not torch.equal(first[scorer, estimator, 0], second[scorer, estimator, 0]), (scorer, estimator)
