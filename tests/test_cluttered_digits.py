"""The cluttered digits are deterministic, split by digit image, and never cover the digit."""

import builtins

import pytest
import torch

from hf_hardattn.errors import HardAttentionError

pytest.importorskip("sklearn")
from hf_hardattn.training.cluttered import patches_in_box
from hf_hardattn.training.cluttered_digits import LARGE, SCENE, ClutteredDigits, digit_bank, sample_batch


def _draw(split="train", size=32, clutter=5, seed=0, scene=SCENE):
    return sample_batch(split, size, clutter, torch.Generator().manual_seed(seed), scene)


def _crop(image, box, scene=SCENE):
    top, left, bottom, right = (box * scene.patch).tolist()
    return image[top:bottom, left:right]


@pytest.mark.parametrize("scene", [SCENE, LARGE], ids=["64", "100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_batch_has_the_stated_shapes_and_ranges(split, scene):
    batch = _draw(split, scene=scene)
    canvas = scene.canvas
    assert batch["pixel_values"].shape == (32, 1, canvas, canvas) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].min() == -1.0 and batch["pixel_values"].max() <= 1.0
    assert batch["labels"].shape == (32,) and set(batch["labels"].tolist()) <= set(range(10))
    box = batch["box"]
    assert box.shape == (32, 4) and box.min() >= 0 and box.max() <= scene.grid
    assert (box[:, 2:] - box[:, :2] == 2).all()


def test_equal_seeds_give_equal_images_and_others_do_not():
    first, again, other = (ClutteredDigits("test", 16, 7, seed) for seed in (3, 3, 4))
    assert len(first) == 16
    assert all(torch.equal(first[i][name], again[i][name]) for i in range(16) for name in first[i])
    assert not torch.equal(first.columns["pixel_values"], other.columns["pixel_values"])


def test_splits_share_no_digit_and_every_class_is_in_both():
    train, test = digit_bank("train"), digit_bank("test")
    seen = {image.numpy().tobytes() for image in train.images[0]}
    assert len(train.labels) + len(test.labels) == 1797 and len(test.labels) / 1797 == pytest.approx(0.25, abs=0.01)
    assert not seen & {image.numpy().tobytes() for image in test.images[0]}
    assert train.labels.bincount(minlength=10).min() > 100 and test.labels.bincount(minlength=10).min() > 40


@pytest.mark.parametrize("scene", [SCENE, LARGE], ids=["64", "100"])
def test_the_box_holds_the_labelled_digit_and_no_fragment_covers_it(scene):
    batch, bank = _draw("test", clutter=40, scene=scene), digit_bank("test", scene.item)
    for image, label, box in zip(batch["pixel_values"][:, 0], batch["labels"], batch["box"], strict=True):
        crop = (_crop(image, box, scene) + 1) / 2
        match = (bank.images[0] - crop).abs().amax((1, 2)) < 1e-6
        assert match.any() and (bank.labels[match] == label).all()


def test_the_patches_of_a_box_are_those_with_the_ink():
    batch = _draw(clutter=0)
    inside = patches_in_box(batch["box"], SCENE.grid)
    ink = torch.nn.functional.max_pool2d(batch["pixel_values"], SCENE.patch).flatten(1) > -1
    assert inside.sum(1).tolist() == [4] * 32 and (ink <= inside).all() and (ink.sum(1) >= 2).all()


def test_without_clutter_all_ink_is_the_digit_and_clutter_adds_ink_outside():
    for clutter, outside in ((0, False), (12, True)):
        batch = _draw(clutter=clutter)
        ink = (batch["pixel_values"] + 1).sum((1, 2, 3))
        inside = torch.stack(
            [(_crop(i, b) + 1).sum() for i, b in zip(batch["pixel_values"][:, 0], batch["box"], strict=True)]
        )
        assert ((ink - inside) > 1e-3).all() == outside


@pytest.mark.parametrize("size, clutter", [(0, 1), (1, -1)])
def test_sizes_out_of_range_raise(size, clutter):
    with pytest.raises(HardAttentionError, match=f"size={size}, clutter={clutter} is out of range"):
        _draw(size=size, clutter=clutter)


def test_an_unknown_split_raises_with_the_names_that_exist():
    with pytest.raises(HardAttentionError, match="unknown split 'tset'; known: 'test', 'train'"):
        _draw("tset")


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"scikit-learn.*hf-hardattn\[demo\]"):
        digit_bank.__wrapped__("test")
