"""Two resolutions: patches are embedded only where a scorer of pixels chose them, with the positions of images of any size."""

from __future__ import annotations

import pytest
import torch
from cases import close, harden, run, stock
from peft import LoraConfig, inject_adapter_in_model
from rounding import FEW, assert_rounded
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.backbones.video import BlipForVideoCaptioning
from hf_hardattn.efficiency.counting import flops_by_part
from hf_hardattn.inspection.rationale import kept_places, pixel_boxes
from hf_hardattn.modeling.patches import embed_patches, embed_positions

SCOUT = {"sites": ["vision.inputs"], "scorer": "scout", "scorer_options": {"hidden": 8, "cells": 2}, "budget": 4}
HEADS = [("vit", "ViTForImageClassification"), ("vit", "ViTModel"), ("blip", "BlipForConditionalGeneration")]


def example(architecture, head, size=None, **changes):
    """The tiny example with a scout, and with images of another size than its 12 x 12 pixels."""
    made = stock(architecture, head)
    harden(made.model, {**SCOUT, **changes})
    if size is not None:
        resize(made, size)
    return made


def resize(made, size):
    torch.manual_seed(5)
    made.batch["pixel_values"] = torch.randn(*made.batch["pixel_values"].shape[:2], *size)
    made.batch["interpolate_pos_encoding"] = True


def vision(model):
    return getattr(model, "vit", None) or getattr(model, "vision_model", None) or model


@pytest.mark.parametrize("grid", [(3, 3), (7, 7), (9, 4), (2, 2), (31, 17)])
@pytest.mark.parametrize(("architecture", "head"), [HEADS[1], HEADS[2]])
def test_positions_are_those_of_transformers(architecture, head, grid):
    embeddings = vision(stock(architecture, head).model).embeddings
    table = embeddings.position_embeddings if architecture == "vit" else embeddings.position_embedding
    count = grid[0] * grid[1]
    with torch.no_grad():
        whole = embeddings.interpolate_pos_encoding(torch.empty(1, 1 + count, 24), 4 * grid[0], 4 * grid[1])
        patches = torch.stack([torch.randperm(count)[: min(count, 5)] for _ in range(3)])
        found = embed_positions(table, patches, grid)
    assert_rounded(found, whole[0, 1:][patches], FEW)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_patch_is_what_the_convolution_makes_of_it(wrapped):
    """Also where an adapter stands around the convolution."""
    projection = nn.Conv2d(3, 7, (4, 5), (4, 5))
    pixels, patches = (
        torch.randn(2, 3, 14, 21),
        torch.tensor([[0, 5, 11], [8, 3, 1]]),
    )  # 3 x 4 patches, and some pixels over
    with torch.no_grad():
        whole = projection(pixels).flatten(2).transpose(1, 2)
        found = embed_patches(nn.Sequential(projection) if wrapped else projection, pixels, patches, (4, 5))
    assert_rounded(found, whole.gather(1, patches.unsqueeze(-1).expand(-1, -1, 7)))


SURROUNDINGS = {
    "pruning": lambda model, table: prune.identity(table, "weight"),
    "weight norm": lambda model, table: nn.utils.weight_norm(table),
    "parametrization": lambda model, table: nn.utils.parametrizations.weight_norm(table),
    "LoRA": lambda model, table: inject_adapter_in_model(
        LoraConfig(target_modules=["position_embedding"], init_lora_weights=False), model
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize(("architecture", "head"), [("clip", "CLIPVisionModel"), ("siglip", "SiglipVisionModel")])
def test_positions_are_those_that_their_module_returns(architecture, head, surrounding):
    """Whatever surrounds it; masked execution embeds every patch with the model's own code."""
    made = example(architecture, head)
    table = next(m for m in made.model.modules() if isinstance(m, nn.Embedding))
    SURROUNDINGS[surrounding](made.model, table)
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.mul_(2.0)
    found = run(made)
    with hf_hardattn.execution(made.model, "masked"):
        close(found, run(made))


@pytest.mark.parametrize("size", [None, (28, 28), (16, 36)])
@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_both_executions_and_budget_one_at_any_size(architecture, head, size):
    made = example(architecture, head, size)
    with hf_hardattn.execution(made.model, "masked"), hf_hardattn.record(made.model) as masked:
        expected = run(made)
    with hf_hardattn.record(made.model) as gathered:
        close(run(made), expected)
    assert torch.equal(gathered[0].mask, masked[0].mask) and (gathered[0].mask.sum(-1) == 5).all()
    plain = stock(architecture, head)
    if size is not None:
        resize(plain, size)
    with hf_hardattn.soft(made.model):
        close(run(made), run(plain), FEW)
    harden(made.model, {**SCOUT, "budget": 1.0})
    close(run(made), run(plain))


def test_the_rows_of_masked_image_modelling_are_the_stock_ones():
    made, rows = example("vit", "ViTForMaskedImageModeling"), []
    handle = made.model.vit.embeddings.register_forward_hook(lambda module, args, output: rows.append(output))
    with hf_hardattn.record(made.model) as selections:
        run(made)
    with hf_hardattn.soft(made.model):
        run(made)
    handle.remove()
    kept = selections["vision.inputs"][0].indices[:, 0, 0]
    assert made.batch["bool_masked_pos"].gather(1, kept[:, 1:] - 1).any()
    assert_rounded(rows[0], rows[1].gather(1, kept.unsqueeze(-1).expand(-1, -1, 24)))


@pytest.mark.parametrize(("architecture", "head"), [HEADS[0], HEADS[2]])
def test_what_was_dropped_is_certified_and_boxed_in_pixels(architecture, head):
    made = example(architecture, head, (20, 36))
    report = hf_hardattn.verify(made.model, made.batch)
    assert report.parity_ok and report.sites[0].certified and report.sites[0].kept_ratio == pytest.approx(4 / 45)
    with hf_hardattn.record(made.model) as selections:
        run(made)
    boxes = pixel_boxes(kept_places(selections, "vision.inputs")[1], 4, (20, 36))
    assert len(boxes) == 4 and all(
        (right - left, low - top) == (4, 4) and right <= 36 and low <= 20 for left, top, right, low in boxes
    )
    inside = torch.zeros(20, 36, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside[int(top) : int(bottom), int(left) : int(right)] = True
    pixels = made.batch["pixel_values"]
    with hf_hardattn.replay(made.model, selections):
        expected = run(made)
        made.batch["pixel_values"] = torch.where(inside | (torch.arange(3) != 1)[:, None, None, None], pixels, 9.0)
    with hf_hardattn.replay(made.model, selections):
        assert all(torch.equal(value, expected[name]) for name, value in run(made).items())


@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_the_tower_costs_the_same_at_every_size(architecture, head):
    counted = []
    for size in ((24, 24), (48, 96)):
        made = example(architecture, head, size, scorer_options={"hidden": 1, "cells": 1})
        with FakeTensorMode(allow_non_fake_inputs=True):  # nothing waits for the device, too
            parts = flops_by_part(lambda made=made: made.model(**made.batch))
        patches = size[0] * size[1] // 16
        channels = made.batch["pixel_values"].shape[1]
        scout = 2 * 3 * patches * (channels + 9)
        assert parts["convolution"] == scout  # no patch was embedded by a convolution over the image
        positions = 2 * 3 * 4 * 9 * 24  # four places interpolated from a table of 3 x 3
        counted.append((parts["linear"] - 2 * 3 * patches - positions, parts["attention"]))
    assert counted[0] == counted[1]


@pytest.mark.parametrize(("architecture", "head"), HEADS)
def test_a_reload_scouts(architecture, head, tmp_path):
    made = example(architecture, head, (28, 28))
    expected = run(made)
    made.model.save_pretrained(tmp_path)
    loaded = type(made.model).from_pretrained(tmp_path).eval()
    (site,) = hf_hardattn.selectors(loaded)
    assert site == "vision.inputs" and any("embeddings.input_selector.scorer" in key for key in loaded.state_dict())
    made.model = loaded
    close(run(made), expected)
    before = stock(architecture, head)
    hf_hardattn.remove(loaded)
    assert list(loaded.state_dict()) == list(before.model.state_dict())
    assert [type(m) for m in loaded.modules()] == [type(m) for m in before.model.modules()]


@pytest.mark.parametrize(("architecture", "head"), [HEADS[0], HEADS[2]])
def test_it_compiles_whole(architecture, head):
    made = example(architecture, head, (28, 28))
    torch._dynamo.reset()
    compiled = torch.compile(made.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**made.batch).logits, made.model(**made.batch).logits)


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_outputs_asked_for_are_those_of_the_kept_rows(asked):
    made = stock("vit", "ViTForImageClassification", attn_implementation="eager")
    harden(made.model, SCOUT)
    with torch.no_grad():
        found = made.model(**made.batch, **asked)
    shapes = {tuple(value.shape) for value in (found.hidden_states or found.attentions)}
    assert shapes == ({(3, 5, 24)} if "output_hidden_states" in asked else {(3, 3, 5, 5)})


def test_an_image_of_another_size_is_refused_as_stock_does():
    made = example("vit", "ViTForImageClassification", (28, 28))
    with pytest.raises(ValueError, match=r"Input image size \(28\*28\) doesn't match model"):
        made.model(pixel_values=made.batch["pixel_values"])
    made = example("blip", "BlipForConditionalGeneration", (28, 28))
    with pytest.raises(RuntimeError, match="must match the size"):
        made.model(**{**made.batch, "interpolate_pos_encoding": False})


def test_a_smaller_image_takes_the_first_positions_as_stock_blip_does():
    made, plain = (
        example("blip", "BlipForConditionalGeneration", (8, 12)),
        stock("blip", "BlipForConditionalGeneration"),
    )
    plain.batch["pixel_values"] = made.batch["pixel_values"]
    del made.batch["interpolate_pos_encoding"]
    harden(made.model, {**SCOUT, "budget": 5})
    close(run(made), _masked(made))
    harden(made.model, {**SCOUT, "budget": 1.0})
    close(run(made), run(plain))


def _masked(made):
    with hf_hardattn.execution(made.model, "masked"):
        return run(made)


def test_patches_that_the_attention_mask_hides_are_never_chosen():
    made, mask = example("vit", "ViTForImageClassification"), torch.ones(3, 10, dtype=torch.long)
    mask[1, 1:7] = 0
    with hf_hardattn.record(made.model) as selections, torch.no_grad():
        found = made.model(**made.batch, attention_mask=mask).logits
    kept = selections["vision.inputs"][0].mask[:, 0, 0]
    assert kept.sum(-1).tolist() == [5, 4, 5] and not (kept & ~mask.bool()).any()
    single = {name: value[1:2] for name, value in made.batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(made.model(**single, attention_mask=mask[1:2]).logits[0], found[1])


def test_no_cells_are_refused():
    with pytest.raises(
        HardAttentionError, match=r"cells=0 is out of range at scorer scout .* A patch is reduced to cells x cells"
    ):
        example("vit", "ViTModel", scorer_options={"cells": 0})


def test_videos_have_no_scout():
    config = stock("blip", "BlipForConditionalGeneration").model.config
    with pytest.raises(HardAttentionError, match=r"reads the pixels of an image; 'vision.inputs' has none"):
        hf_hardattn.apply(BlipForVideoCaptioning(config), SCOUT)
    config.hard_attention = hf_hardattn.HardAttentionConfig.parse(SCOUT)
    with pytest.raises(HardAttentionError, match=r"scorer 'scout' reads .*, but BlipForVideoCaptioning takes videos"):
        BlipForVideoCaptioning(config)
