"""Kept places as characters, boxes, seconds; per generated token; and every picture of them."""

from __future__ import annotations

import itertools
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from examples import build
from transformers import T5Config, T5EncoderModel

import hf_hardattn
from hf_hardattn import HardAttentionError, Selection
from hf_hardattn.backbones.video import BlipForVideoCaptioning
from hf_hardattn.inspection.agreement import jaccard, seed_agreement, selection_diff
from hf_hardattn.inspection.alignment import selection_matrix
from hf_hardattn.inspection.captions import caption_grid
from hf_hardattn.inspection.curves import faithfulness_curves, tradeoff
from hf_hardattn.inspection.frames import frame_strip
from hf_hardattn.inspection.heatmap import heat_map
from hf_hardattn.inspection.html import Html, page, paragraph, table
from hf_hardattn.inspection.overlay import difference_overlay, frame_patches, layer_overlay
from hf_hardattn.inspection.rationale import (
    character_spans,
    frame_places,
    frame_times,
    kept_per_token,
    kept_places,
    pixel_boxes,
    spans_per_token,
)
from hf_hardattn.inspection.style import new_figure
from hf_hardattn.inspection.tokens import mark_spans, token_highlight
from hf_hardattn.recording import Recording

EVIL = "<script>alert('x')</script> & \"quotes\""


def example(architecture: Any, head: str, sites: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    made = build(architecture, head)
    hf_hardattn.apply(made.model.eval(), {"sites": sites})
    return made.model, made.batch


@torch.no_grad()
def recorded(model: Any, batch: dict[str, Any]) -> Recording:
    with hf_hardattn.record(model) as recording:
        model(**batch)
    return recording


def selection_of(mask: list[list[int]], site: str = "vision.inputs") -> Selection:
    kept = torch.tensor(mask, dtype=torch.bool)[:, None, None]
    return Selection(site, kept, torch.ones_like(kept), None, kept.float(), slots=int(kept.sum(-1).max()))


class Opened(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


# -- back to places ----------------------------------------------------------------------------------------------------------------


def test_places_follow_the_stream() -> None:
    """What the second ``tokens`` site and a cross site behind it kept, as places of the image: by a loop over the selections."""
    sites = {"vision.tokens.0": {"budget": 0.7}, "vision.tokens.1": {"budget": 0.5}, "text.cross.*": {"budget": 2}}
    model, batch = example("blip", "BlipForConditionalGeneration", sites)
    recording = recorded(model, batch)
    first, second = recording["vision.tokens.0"][0], recording["vision.tokens.1"][0]
    cross = recording["text.cross.1"][0]
    for row in range(len(batch["pixel_values"])):
        left = [place for place in range(10) if first.mask[row, 0, 0, place]]
        again = [left[i] for i in range(len(left)) if second.mask[row, 0, 0, i]]
        read = [again[i] for i in range(len(again)) if cross.mask[row, 0, 0, i]]
        for site, expected in (("vision.tokens.0", left), ("vision.tokens.1", again), ("text.cross.1", read)):
            found = kept_places(recording, site)[row]
            assert len(found) == 10 and found.nonzero().flatten().tolist() == expected, site


def test_masked_and_gathered_tell_the_same_places() -> None:
    sites = {"vision.tokens.0": {"budget": 0.7}, "vision.tokens.1": {"budget": 0.5}, "text.cross.*": {"budget": 2}}
    model, batch = example("blip", "BlipForConditionalGeneration", sites)
    found = []
    for mode in ("masked", "gathered"):
        with hf_hardattn.execution(model, mode):
            recording = recorded(model, batch)
        found.append([kept_places(recording, site) for site in recording.sites])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


PASSES = [
    ("vit", "ViTForImageClassification", ["vision.self.0", "vision.inputs", "vision.self.1", "vision.tokens.1"]),
    ("bert", "BertForSequenceClassification", ["text.tokens.0", "text.tokens.1"]),
    ("clip", "CLIPModel", ["text.inputs", "text.tokens.1", "vision.inputs", "vision.tokens.1"]),
    ("t5", "T5ForConditionalGeneration", ["encoder.inputs", "encoder.tokens.0", "decoder.self.*", "decoder.cross.*"]),
]


@pytest.mark.parametrize(("architecture", "head", "sites"), PASSES)
def test_each_of_several_passes_tells_its_own_places(architecture: Any, head: str, sites: list[str]) -> None:
    """Two passes over batches of other lengths, recorded together, tell what each tells when it is recorded alone."""
    model, batch = example(architecture, head, dict.fromkeys(sites, {"budget": 0.6}))
    short = {
        name: value[:, :6].contiguous() if value.dim() == 2 else value
        for name, value in batch.items()
        if name != "return_loss"
    }
    alone = [recorded(model, one) for one in (batch, short)]
    with torch.no_grad(), hf_hardattn.record(model) as recording:
        model(**batch)
        model(**short)
    expected = [found.kept(selection) for found in alone for selection in found]
    assert len(recording) == len(expected)
    assert all(torch.equal(recording.kept(made), kept) for made, kept in zip(recording, expected, strict=True))
    assert heat_map(recording).axes


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_says_what_each_token_read(beams: int) -> None:
    """Teacher-forcing the generated text makes the same choices: the recording of generate(), beam by beam, is the truth."""
    sites = {"decoder.cross.*": {"budget": 3, "scorer": "query_key"}}
    model, batch = example("t5", "T5ForConditionalGeneration", sites)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, num_beams=beams, return_dict_in_generate=True)
    with hf_hardattn.record(model) as recording:
        made = model.generate(**inputs, **options)
    forced = recorded(model, {**inputs, "decoder_input_ids": made.sequences[:, :-1]})
    for site in ("decoder.cross.0", "decoder.cross.1"):
        found = kept_per_token(recording, site, made.beam_indices if beams > 1 else None)
        expected = forced.kept(forced[site][0]).any(1)
        assert torch.equal(found, expected[:, : found.shape[1]]), site
        assert found.shape == (3, 5, 11)


def test_generated_tokens_know_the_characters_they_read() -> None:
    """Words of four letters and a space: place p of the source is characters 5 p to 5 p + 4, whichever beam won."""
    sites = {"decoder.cross.*": {"budget": 1, "scorer": "query_key"}}
    model, batch = example("t5", "T5ForConditionalGeneration", sites)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with hf_hardattn.record(model) as recording:
        made = model.generate(**inputs, max_new_tokens=4, num_beams=3, return_dict_in_generate=True)
    offsets = [[(5 * place, 5 * place + 4) for place in range(11)] for _ in range(3)]
    found = spans_per_token(recording, "decoder.cross.0", offsets, made.beam_indices)
    kept = kept_per_token(recording, "decoder.cross.0", made.beam_indices)
    for row, tokens in enumerate(found):
        for step, spans in enumerate(tokens):
            assert spans == [(5 * p, 5 * p + 4) for p in kept[row, step].nonzero().flatten().tolist()]
    with pytest.raises(HardAttentionError, match="2 lists of offsets for 3 generated rows"):
        spans_per_token(recording, "decoder.cross.0", offsets[:2], made.beam_indices)


def test_a_shared_choice_serves_every_token() -> None:
    model, batch = example("blip", "BlipForConditionalGeneration", {"text.cross.*": {"budget": 2}})
    with hf_hardattn.record(model) as recording:
        made = model.generate(
            pixel_values=batch["pixel_values"], max_new_tokens=4, num_beams=2, return_dict_in_generate=True
        )
    found = kept_per_token(recording, "text.cross.0", made.beam_indices)
    assert len(recording["text.cross.0"]) == 1 and found.shape[0] == 3
    assert (found[:, 0] == found[:, 1]).all() and (found[:, 0].sum(-1) == 3).all()  # CLS is kept besides


def test_wrong_recording_for_the_beams() -> None:
    recording = Recording([selection_of([[1, 0]], "decoder.cross.0")] * 2, {"decoder": "encoder"})
    recording[1].mask = recording[1].mask.expand(1, 1, 2, -1)
    with pytest.raises(
        HardAttentionError, match="holds 2 selections at 'decoder.cross.0' and the sequences have 5 tokens"
    ):
        kept_per_token(recording, "decoder.cross.0", torch.zeros(1, 5, dtype=torch.long))


def test_recording_runs_no_tensor_operation() -> None:
    """Its cost is a hook's: not one operation more than without."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    model, batch = example("vit", "ViTForImageClassification", {"vision.inputs": {}, "vision.self.*": {}})
    counts = []
    for block in (lambda: hf_hardattn.soft(torch.nn.Identity()), lambda: hf_hardattn.record(model)):
        with torch.no_grad(), block(), Count() as count:
            model(**batch)
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_every_recorded_choice_has_its_probability() -> None:
    """In evaluation too: against the law enumerated by hand."""
    model, batch = example("vit", "ViTForImageClassification", {"vision.inputs": {"budget": 3, "estimator": "imle"}})
    made = recorded(model, batch)["vision.inputs"][0]
    for row in range(len(made.mask)):
        scores = made.scores[row, 0, 0, 1:].double()  # CLS is first, and no choice
        weights = {s: sum(scores[i] for i in s).exp() for s in itertools.combinations(range(9), 3)}
        every = sum(weights.values())
        kept = tuple(i for i in range(9) if made.mask[row, 0, 0, 1 + i])
        assert made.log_prob[row, 0, 0].item() == pytest.approx(float((weights[kept] / every).log()), abs=1e-5)
        entropy = -sum(float(w / every * (w / every).log()) for w in weights.values())
        assert made.entropy[row, 0, 0].item() == pytest.approx(entropy, abs=1e-4)
    (summary,) = recorded(model, batch).summary()
    assert summary["entropy"] == pytest.approx(float(made.entropy.mean()))


def test_a_training_choice_keeps_the_probability_it_was_drawn_with() -> None:
    model, batch = example(
        "vit", "ViTForImageClassification", {"vision.inputs": {"budget": 3, "estimator": "reinforce"}}
    )
    model.train()
    with hf_hardattn.record(model) as recording:
        model(**batch)
    assert recording[0].log_prob.requires_grad and recording[0].log_prob is recording[0].log_prob


def test_characters_boxes_seconds() -> None:
    offsets = [(0, 3), (3, 7), (8, 11), (0, 0)]  # "hello world": "hel" "lo w"...; then </s>
    assert character_spans(torch.tensor([1, 1, 0, 1], dtype=torch.bool), offsets) == [(0, 7)]
    assert character_spans(torch.tensor([1, 0, 1, 1], dtype=torch.bool), offsets) == [(0, 3), (8, 11)]
    with pytest.raises(HardAttentionError, match="4 offsets for 2 positions"):
        character_spans(torch.ones(2, dtype=torch.bool), offsets)
    kept = torch.tensor([1, 0, 1, 0, 0, 0, 1], dtype=torch.bool)  # CLS, then 2 x 3 patches of 4 pixels
    assert pixel_boxes(kept, 4, (8, 12)) == [(4, 0, 8, 4), (8, 4, 12, 8)]
    assert pixel_boxes(kept, 4, (8, 12), (80, 60)) == [(20, 0, 40, 40), (40, 40, 60, 80)]
    with pytest.raises(HardAttentionError, match="7 positions do not fit 3 x 3 patches"):
        pixel_boxes(kept, 4, (12, 12))
    assert frame_times(torch.tensor([1, 0, 1, 1], dtype=torch.bool), [0.0, 0.5, 1.0]) == [0.0, 1.0]
    with pytest.raises(HardAttentionError, match="3 frames for 2 positions"):
        frame_times(torch.ones(2, dtype=torch.bool), [0.0, 0.5, 1.0])
    assert frame_places(torch.ones(2, dtype=torch.bool), 1, patches=True).shape == (1, 1)
    padded = torch.arange(17) == 0  # 8 frames, one place each, </s> and padding
    assert frame_places(padded, 8).flatten().tolist() == [True] + [False] * 7
    for frames in (0, 5):
        with pytest.raises(HardAttentionError, match=f"{frames} frames for 17 positions"):
            frame_places(padded, frames, patches=True)
    with pytest.raises(HardAttentionError, match="4 offsets for 6 positions, and one after the last offset is kept"):
        character_spans(torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.bool), offsets)  # padded on the left


def test_frames_and_boxes_leave_registers_out() -> None:
    """Four registers and CLS before a grid of 4 x 4: as many frames as kept patches, at their places."""
    kept = torch.zeros(5 + 16, dtype=torch.bool)
    kept[[0, 1, 2, 3, 4, 5 + 6, 5 + 15]] = True
    figure = new_figure(2, 2)
    axis = figure.subplots()
    frame_patches(axis, kept, 8, (32, 32))
    corners = [(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in axis.patches]
    assert corners == [(16, 8), (24, 24)]
    assert pixel_boxes(kept, 8, (32, 32)) == [(16, 8, 24, 16), (24, 24, 32, 32)]


def test_recording_as_a_notebook_shows_it() -> None:
    model, batch = example("vit", "ViTForImageClassification", {"vision.inputs": {"budget": 3}})
    recording = recorded(model, batch)
    (row,) = recording.summary()
    assert row["site"] == "vision.inputs" and row["calls"] == 1 and row["kept_ratio"] == pytest.approx(3 / 9)
    assert Opened(recording._repr_html_()).tags[0] == "table" and "33.3%" in recording._repr_html_()


# -- pictures ----------------------------------------------------------------------------------------------------------------------


def drawn(figure: Any) -> int:
    """Bytes of the figure's PNG: it draws."""
    import io

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_layer_overlay_shows_every_site() -> None:
    sites = {"vision.inputs": {"budget": 6}, "vision.tokens.0": {"budget": 0.5}}
    model, batch = example("vit", "ViTForImageClassification", sites)
    figure = layer_overlay(batch["pixel_values"][:, :1], recorded(model, batch), 4, row=1)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["image", "vision.inputs: 67%", "vision.tokens.0: 33%"] and drawn(figure) > 2000
    assert [len(axis.patches) for axis in figure.axes] == [0, 6, 3]
    with pytest.raises(HardAttentionError, match="no vision site to draw; it has: encoder.inputs"):
        layer_overlay(batch["pixel_values"], Recording([selection_of([[1, 0]], "encoder.inputs")]), 4)


def test_highlight_is_escaped_and_loses_no_character() -> None:
    offsets = [(i, i + 1) for i in range(len(EVIL))]
    recording = Recording([selection_of([[i % 3 == 0 for i in range(len(EVIL))]], "encoder.inputs")])
    made = token_highlight(recording, EVIL, offsets)
    opened = Opened(made.split("</style>")[1])
    assert opened.text == EVIL and set(opened.tags) == {"p", "mark", "s"}
    assert isinstance(made, Html) and made._repr_html_() == made
    assert Opened(mark_spans("ab cd", [(0, 2)])).text == "ab cd"


def test_page_escapes_everything() -> None:
    opened = Opened(page(EVIL, paragraph(EVIL, EVIL), table([EVIL], [[EVIL, 3, 0.5]])))
    assert opened.tags.count("script") == 0 and opened.text.count(EVIL) == 5  # title, heading, paragraph, two cells


def test_matrix_marks_what_was_kept() -> None:
    model, batch = example(
        "t5", "T5ForConditionalGeneration", {"decoder.cross.1": {"budget": 3, "scorer": "query_key"}}
    )
    recording = recorded(model, batch)
    figure = selection_matrix(recording, [f"$s{i}" for i in range(11)], [f"t{i}" for i in range(7)])
    cells = torch.as_tensor(figure.axes[0].collections[0].get_array().data).view(7, 11)
    assert torch.equal(cells.bool(), recording["decoder.cross.1"][0].mask[0, 0]) and drawn(figure) > 2000


def test_caption_grid_has_a_picture_a_word() -> None:
    model, batch = example(
        "blip", "BlipForConditionalGeneration", {"text.cross.*": {"budget": 2, "scorer": "query_key"}}
    )
    with hf_hardattn.record(model) as recording:
        made = model.generate(pixel_values=batch["pixel_values"], max_new_tokens=4, min_new_tokens=4)
    words = [str(token) for token in made[1, 1:].tolist()]
    figure = caption_grid(batch["pixel_values"], recording, words, 4, row=1)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == words
    expected = [int(kept[1:].sum()) for kept in kept_per_token(recording, "text.cross.0")[1]]
    assert [len(axis.patches) for axis in figure.axes][: len(words)] == expected[: len(words)] and drawn(figure) > 2000


def test_frame_strip_of_a_video_read_as_embeddings() -> None:
    """A T5 encoder reads one embedding a frame; the strip frames what it kept, and the seconds are those of the frames."""
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()
    hf_hardattn.apply(model, {"sites": {"encoder.inputs": {"budget": 3}}})
    frames, times = torch.rand(8, 3, 6, 9), [0.25 * i for i in range(8)]
    recording = recorded(model, {"inputs_embeds": torch.randn(1, 9, 16)})  # the last place is the row's end
    figure = frame_strip(frames, recording, times)
    titles = [axis.get_title() for axis in figure.axes]
    seconds = frame_times(kept_places(recording, "encoder.inputs")[0], times)
    assert [t for t in titles if "kept" in t] == [f"{s:.2f} s (kept)" for s in seconds] and len(seconds) == 3
    assert drawn(figure) > 2000


@pytest.mark.parametrize("whole", [True, False])
def test_frame_strip_of_a_video_read_as_patches(whole: bool) -> None:
    """BLIP reads every frame's patches in one row behind CLS: a frame is kept where a patch of it is."""
    torch.manual_seed(0)
    made = build("blip", "BlipForConditionalGeneration")
    batch, model = made.batch, BlipForVideoCaptioning(made.model.config).eval()
    site = {"budget": 0.25, "scorer": "conv", "scorer_options": {"frames": 4, "whole_frames": whole}}
    hf_hardattn.apply(model, {"sites": {"vision.inputs": site}})
    patches = (batch["pixel_values"].shape[-1] // 4) ** 2
    frames = torch.rand(4, 3, *batch["pixel_values"].shape[-2:])
    recording = recorded(model, {"pixel_values": frames[None], "input_ids": batch["input_ids"][:1]})
    kept = frame_places(kept_places(recording, "vision.inputs")[0], 4, patches=True)
    assert kept.shape == (4, patches) and kept.sum() == patches
    assert frame_times(kept_places(recording, "vision.inputs")[0], [0.0, 0.5, 1.0, 1.5], patches=True) == [
        0.5 * f for f in kept.any(-1).nonzero().flatten().tolist()
    ]
    figure = frame_strip(frames, recording)
    titles = [axis.get_title() for axis in figure.axes]
    shares = [float(frame.float().mean()) for frame in kept]
    assert titles == [f"{i} (kept)" if s == 1 else f"{i} ({s:.0%})" if s else f"{i}" for i, s in enumerate(shares)]
    assert drawn(figure) > 2000 and (not whole or sorted(shares) == [0, 0, 0, 1])


def test_heat_map_and_curves() -> None:
    model, batch = example("vit", "ViTForImageClassification", {"vision.inputs": {"budget": 3}, "vision.tokens.1": {}})
    recording = recorded(model, batch)
    figure = heat_map(recording)
    rates = torch.as_tensor(figure.axes[0].images[0].get_array().data)
    assert rates.shape == (2, 10) and torch.allclose(rates[0], kept_places(recording, "vision.inputs").float().mean(0))
    row = {"deletion": 0.2, "insertion": 0.8, "curves": {"deletion": [1, 0.4, 0.1], "insertion": [0.1, 0.7, 1]}}
    assert drawn(faithfulness_curves({"selection": row, "random": row})) > 2000
    points = {"soft": [(1.0, 0.9)], "hard": [(0.4, 0.85), (0.2, 0.8)]}
    assert drawn(tradeoff(points, "GFLOPs (counted)", "accuracy", {"hard": [0.01, 0.02]})) > 2000


# -- agreement ---------------------------------------------------------------------------------------------------------------------


def test_agreement_and_its_chance_level() -> None:
    one = Recording([selection_of([[1, 1, 0, 0], [1, 0, 1, 0]])])
    other = Recording([selection_of([[1, 0, 1, 0], [1, 0, 1, 0]])])
    found = jaccard(one, other)["vision.inputs"]
    assert found["jaccard"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["chance"] == pytest.approx(
        (4 * (1 / 3) + 1) / 6
    )  # two of four: 1 of 6 pairs equal, 4 share one, 1 none
    assert seed_agreement([one, other, one])["vision.inputs"]["jaccard"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    with pytest.raises(HardAttentionError, match="1 recording is not enough"):
        seed_agreement([one])
    with pytest.raises(HardAttentionError, match="share no site"):
        jaccard(one, Recording([selection_of([[1, 0]], "encoder.inputs")]))


def test_diff_between_two_checkpoints() -> None:
    first, batch = example("vit", "ViTForImageClassification", {"vision.inputs": {"budget": 3}})
    second, _ = example("vit", "ViTForImageClassification", {"vision.inputs": {"budget": 5}})
    (same,) = selection_diff(first, first, batch)
    assert same.jaccard == 1.0 and not same.first_only.any() and not same.second_only.any()
    (found,) = selection_diff(first, second, batch)  # the same weights: the second keeps two more
    assert not found.first_only.any() and (found.second_only.sum(-1) == 2).all() and (found.both.sum(-1) == 3).all()
    assert "only the second 6; Jaccard 0.60" in str(found)
    figure = difference_overlay(batch["pixel_values"][:, :1], found, 4)
    assert [axis.get_title() for axis in figure.axes] == ["-0 +2"] * 3 and drawn(figure) > 2000
