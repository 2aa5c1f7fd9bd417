"""Faithfulness: the definitions, the modules of ``evaluate``, the certificate, planted rationales, and broken selections caught."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import pytest
import torch
from examples import build
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn import HardAttentionError, metrics
from hf_hardattn.functional.patches import noise_like
from hf_hardattn.inspection import attribution, measures
from hf_hardattn.inspection.agreement import selection_diff
from hf_hardattn.inspection.collapse import find_collapse
from hf_hardattn.inspection.faithfulness import compare, faithfulness, own_sufficiency, plausibility, top
from hf_hardattn.inspection.perturbation import PerturbationEvaluator
from hf_hardattn.inspection.sanity import randomised_weights, shuffled
from hf_hardattn.modeling import heads, layers

sys.path.insert(0, str(Path(__file__).parent / "laws"))
from rounding import SOME, tolerance  # noqa: E402

HEADS = [
    ("t5", "T5ForConditionalGeneration", "encoder.inputs"),
    ("vit", "ViTForImageClassification", "vision.inputs"),
    ("blip", "BlipForConditionalGeneration", "vision.inputs"),
]


def example(architecture: Any, head: str, sites: Any, **changes: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    made = build(architecture, head)
    hf_hardattn.apply(made.model.eval(), {"sites": sites, **changes})
    return made.model, made.batch


# -- definitions -------------------------------------------------------------------------------------------------------------------


def test_eraser_definitions() -> None:
    full, part = torch.tensor([0.9, 0.5]), torch.tensor([[0.8, 0.9], [0.1, 0.5]])
    expected = [[0.9 - 0.8, 0.9 - 0.9], [0.5 - 0.1, 0.5 - 0.5]]
    for measure in (measures.sufficiency, measures.comprehensiveness):
        assert torch.allclose(measure(full, part), torch.tensor(expected))
        assert torch.allclose(measure(full, part[:, 0]), torch.tensor(expected)[:, 0])
    assert measures.area(torch.tensor([1.0, 0.5, 0.0])) == pytest.approx((0.75 + 0.25) / 2)
    with pytest.raises(HardAttentionError, match="a curve of 1 points has no area"):
        measures.area(torch.tensor([1.0]))


def test_agreement_with_a_person() -> None:
    found, human = [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]
    assert measures.token_f1(found, human) == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    assert measures.token_f1([0, 0], [1, 0])["f1"] == 0.0
    assert measures.overlap(found, human) == pytest.approx(2 / 4) and measures.overlap([0], [0]) == 1.0
    assert measures.average_precision([0.9, 0.8, 0.1], [1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert measures.average_precision([0.9], [0]) != measures.average_precision([0.9], [0])  # NaN
    assert measures.rank_correlation([1, 2, 3], [10, 30, 20]) == pytest.approx(1 / 3)


def test_modules_load_combine_and_agree_with_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = {name: evaluate.load(metrics.path(name)) for name in metrics.names()}
    assert len(loaded) == 8
    full, part = [0.9, 0.5], [[0.8, 0.9], [0.1, 0.5]]
    for name in ("sufficiency", "comprehensiveness"):
        assert loaded[name].compute(predictions=part, references=full)[name] == pytest.approx(0.125)
        assert loaded[name].compute(predictions=[0.8, 0.1], references=full)[name] == pytest.approx(0.25)
    masks = {"predictions": [[1, 1, 0], [1, 0, 0]], "references": [[1, 0, 0], [0, 0, 1]]}
    both = evaluate.combine([loaded["rationale_f1"], loaded["rationale_iou"], loaded["selection_jaccard"]]).compute(
        **masks
    )
    assert both["rationale_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert both["rationale_iou"] == both["selection_jaccard"] == pytest.approx(0.25)
    scores = {"predictions": [[0.9, 0.2, 0.1], [0.1, 0.2, 0.3]], "references": [[1, 0, 0], [0, 0, 0]]}
    assert loaded["rationale_auprc"].compute(**scores) == {"rationale_auprc": 1.0}  # the empty rationale tells nothing
    ranks = {"predictions": [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], "references": [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]}
    assert loaded["rank_correlation"].compute(**ranks)["rank_correlation"] == pytest.approx(-1.0)
    curve = {"predictions": [[0.8, 0.4, 0.0]], "references": [0.8]}
    assert loaded["perturbation_auc"].compute(**curve)["perturbation_auc"] == pytest.approx(0.5)
    with pytest.raises(HardAttentionError, match="unknown metric 'suficiency'.*Did you mean 'sufficiency'"):
        metrics.path("suficiency")


def test_top_takes_a_share_rounded_up_ties_to_the_left() -> None:
    places = torch.tensor([[0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    scores = torch.tensor([[9.0, 1.0, 3.0, 3.0, 2.0, 9.0]])
    kept = [top(scores, places, ratio)[0].nonzero().flatten().tolist() for ratio in (0.0, 0.01, 0.25, 0.26, 1.0)]
    assert kept == [[], [2], [2], [2, 3], [1, 2, 3, 4]]


# -- by construction ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "head", "site"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_inputs_site_is_faithful_by_construction(architecture: Any, head: str, site: str) -> None:
    """Sufficiency of what the model kept is exactly 0, what it dropped counts for exactly nothing, and the certificate holds."""
    model, batch = example(architecture, head, {site: {"budget": 0.4}, "*.self.0": {}})
    report = {found.site: found for found in hf_hardattn.verify(model, batch).sites}
    assert report[site].certified and report[site].leak == 0.0
    assert "cannot influence the output: it is bit-identical" in report[site].statement
    evaluator = PerturbationEvaluator(model, batch, answer_tokens=5)
    assert evaluator.removal == "select" and torch.equal(own_sufficiency(evaluator), torch.zeros(3))
    left_out = attribution.leave_one_out(evaluator)
    assert (left_out[~evaluator.own()] == 0).all() and (left_out != 0).any()


@pytest.mark.parametrize(("architecture", "head", "site"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_a_row_does_not_depend_on_what_other_rows_keep(architecture: Any, head: str, site: str) -> None:
    """The batch has another shape when others keep less or more, so that the row may be rounded differently, and no more."""
    model, batch = example(architecture, head, {site: {"budget": 0.4}, "*.self.0": {}})
    evaluator = PerturbationEvaluator(model, batch, answer_tokens=5)
    own = evaluator.own()
    for row in range(len(own)):
        others = torch.arange(len(own)) != row
        less, more = own.clone(), own.clone()
        less[others] &= less[others].cumsum(-1) > 2  # all but the first two kept
        more[others] = evaluator.places[others]
        for keep in (less, more):
            # of a probability, relative: the absolute error of its logarithm, which a few layers of rounded sums make up
            torch.testing.assert_close(
                evaluator(keep)[row], evaluator.full[row], rtol=tolerance(torch.float32, SOME), atol=0
            )


@pytest.mark.parametrize("lay", ["contiguous", "channels_last", "permuted"])
def test_certificate_does_not_depend_on_memory_layout(lay: str) -> None:
    """A processor may hand over transposed pixels, whose convolution differs in the last bits: that is no leak."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=64)
    model = ViTForImageClassification(ViTConfig(patch_size=8, num_channels=1, **sizes)).eval()
    hf_hardattn.apply(model, {"sites": ["vision.inputs"], "budget": 9})
    pixels = torch.randn(6, 64, 64, 1).permute(0, 3, 1, 2)
    if lay != "permuted":
        pixels = pixels.clone(memory_format=getattr(torch, f"{lay}_format" if lay == "contiguous" else lay))
    assert hf_hardattn.verify(model, {"pixel_values": pixels}).sites[0].certified


def test_the_leak_names_its_channel() -> None:
    sites = {"vision.tokens.1": {"budget": 0.5}, "vision.self.0": {"budget": 3}, "vision.self.2": {"budget": 2}}
    model, batch = example("vit", "ViTForImageClassification", sites)
    report = {found.site: found for found in hf_hardattn.verify(model, batch).sites}
    assert "through earlier layers (layers 0 to 1 mixed it into the kept tokens)" in report["vision.tokens.1"].statement
    assert "through the residual stream (its own row goes on" in report["vision.self.0"].statement
    assert "in 3 of 3 rows" in report["vision.self.0"].statement
    later = report["vision.self.2"]
    assert (
        later.leak and later.leak > 0 and "layers 0 to 1" in later.statement
    )  # measured, though rows were dropped before


@pytest.mark.parametrize("shared", [False, True])
def test_attention_that_shares_the_choice_carries_nothing(shared: bool) -> None:
    fields = {"budget": 2, "share_selection": shared}
    model, batch = example("t5", "T5ForConditionalGeneration", {"decoder.cross.*": fields, "encoder.self.*": fields})
    report = {found.site: found for found in hf_hardattn.verify(model, batch).sites}
    assert ("and the other layers' cross-attention" in report["decoder.cross.0"].statement) is not shared
    assert "the encoder's layers (they mixed it into the kept rows)" in report["decoder.cross.0"].statement
    assert ("and later layers read it" in report["encoder.self.0"].statement) is not shared
    assert "through the residual stream (its own row goes on" in report["encoder.self.0"].statement


@pytest.mark.parametrize("site", ["decoder.cross.0", "encoder.inputs", "encoder.tokens.0"])
@pytest.mark.parametrize("architecture", ["t5", "bart", "whisper"])
def test_an_input_that_the_model_did_not_read_is_not_measured(architecture: Any, site: str) -> None:
    """With ``encoder_outputs`` the encoder does not run, though what it once read is in the batch."""
    head = {"t5": "T5", "bart": "Bart", "whisper": "Whisper"}[architecture] + "ForConditionalGeneration"
    model, batch = example(architecture, head, {site: {"budget": 0.4}, "decoder.cross.1": {"budget": 0.4}})
    read = [name for name in ("input_ids", "input_features", "attention_mask") if name in batch]
    with torch.no_grad():
        batch["encoder_outputs"] = model.get_encoder()(**{name: batch[name] for name in read})
    report = hf_hardattn.verify(model, batch)
    assert report.parity_ok and {found.site for found in report.sites} == {site, "decoder.cross.1"}
    for found in report.sites:
        assert (found.leak, found.certified, found.overlap) == (None, False, None) and "not measured" in found.statement


class Deaf(ViTForImageClassification):
    """The model runs, and its answer does not depend on it."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return {"logits": torch.zeros_like(super().forward(pixel_values, **kwargs).logits)}


def test_an_input_that_does_not_reach_the_output_is_not_measured() -> None:
    made = build("vit", "ViTForImageClassification")
    deaf = hf_hardattn.apply(Deaf(made.model.config).eval(), {"sites": {"vision.inputs": {"budget": 3}}})
    (found,) = hf_hardattn.verify(deaf, {"pixel_values": made.batch["pixel_values"]}).sites
    assert found.leak is None and not found.certified
    assert "not measured, because the input of 'vision' did not reach the output" in found.statement


SPECIAL = [
    {"pad_token_id": 0, "bos_token_id": 51, "eos_token_id": 52},  # CLIP's
    {"pad_token_id": 49, "bos_token_id": 48, "eos_token_id": [51, 52]},  # Llama 3's
    {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 52},
    {},
]


@pytest.mark.parametrize("special", SPECIAL, ids=str)
def test_every_replacement_is_another_ordinary_token(special: dict[str, Any]) -> None:
    """By a loop: nothing stays, no special token is put in, noise is not the constant, and a neighbour is the nearest one there is."""
    ordinary = heads.ordinary_tokens(SimpleNamespace(vocab_size=53, **special))
    names = {token for value in special.values() for token in (value if isinstance(value, list) else [value])}
    assert ordinary.tolist() == [token for token in range(53) if token not in names]
    ids = torch.randint(0, 53, (4, 60), generator=torch.Generator().manual_seed(7))
    ids[0], ids[1, :] = (
        ordinary[0],
        torch.tensor([51, 52] * 30),
    )  # nothing but the constant; two tokens, special ones or not
    dropped = torch.rand(ids.shape, generator=torch.Generator().manual_seed(8)) < 0.8
    noise, constant, swap = (heads.replace_tokens(ids, dropped, ordinary, how, 7) for how in ("noise", "zero", "swap"))
    for found in (noise, constant, swap):
        assert torch.equal(found[~dropped], ids[~dropped]) and (found != ids)[dropped].all()
        assert torch.isin(found[dropped], ordinary).all()
    assert (noise != constant)[dropped].all() and len(noise[dropped].unique()) > 30
    for row, place in dropped.nonzero().tolist():
        near = [t for t in ids[row].roll(-place).flip(0).tolist() if t != ids[row, place] and t not in names]
        assert not near or swap[row, place] == near[0]


def test_a_vocabulary_without_other_tokens_is_refused() -> None:
    with pytest.raises(HardAttentionError, match="only 2 tokens of the vocabulary are not special"):
        heads.replace_tokens(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3) > 0, torch.arange(2), "noise", 0)


@pytest.mark.parametrize("eos", [52, 2])  # 2: CLIP pools at the highest id
def test_a_dropped_bos_of_clip_is_seen(eos: int) -> None:
    """All rows begin with BOS, which is all that is dropped, behind a layer that mixed it into the others; a text still ends where it did."""
    torch.manual_seed(0)
    made = build("clip", "CLIPTextModelWithProjection", bos_token_id=51, eos_token_id=eos)
    model = hf_hardattn.apply(made.model.eval(), {"sites": {"text.tokens.0": {"budget": 6}}})
    ids = torch.randint(3, 50, (3, 8))
    ids[:, 0], ids[:, -1] = 51, 52
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[:, 0] = False
    family: Any = hf_hardattn.models.family_of(model)
    with torch.no_grad(), hf_hardattn.replay(model, {"text.tokens.0": keep}):
        expected = model(input_ids=ids).text_embeds
        for how in ("noise", "zero", "swap"):
            batch = family.replace_inputs(model, {"input_ids": ids}, {"text": ~keep}, how, 0)
            assert (batch["input_ids"][:, 1:] == ids[:, 1:]).all() and (batch["input_ids"] < 52)[:, :-1].all()
            assert (model(**batch).text_embeds != expected).any(-1).all()


def test_noise_is_never_what_was_there() -> None:
    """A batch may have been drawn from the very seed."""
    pixels = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (noise_like(pixels, 0) != pixels).all()


@pytest.mark.parametrize("around", ["masked", "sampled", "soft", "configured"])
def test_verify_says_the_same_inside_any_block(around: str) -> None:
    """It runs gathered and without drawing, for models of either execution, and says nothing of what a block around it switched off."""
    sites = {"vision.inputs": {"budget": 5}, "vision.tokens.1": {"budget": 3}, "vision.self.2": {"budget": 2}}
    model, batch = example("vit", "ViTForImageClassification", sites)
    expected = hf_hardattn.verify(model, batch)
    assert [found.leak is not None for found in expected.sites] == [True, True, True]
    if around == "configured":
        model, _ = example("vit", "ViTForImageClassification", sites, execution="masked")
    blocks: dict[str, Any] = {
        "masked": lambda: hf_hardattn.execution(model, "masked"),
        "sampled": lambda: hf_hardattn.sampled(model),
        "soft": lambda: hf_hardattn.soft(model),
    }
    with blocks.get(around, nullcontext)():
        assert hf_hardattn.verify(model, batch) == expected
        assert any(hf_hardattn.modeling.context.is_soft_now(s) for s in hf_hardattn.selectors(model).values()) == (
            around == "soft"
        )


@pytest.mark.parametrize("changes", [{"budget": 1.0}, {"budget": 3, "estimator": "soft"}], ids=str)
def test_nothing_dropped_is_nothing_certified(changes: dict[str, Any]) -> None:
    model, batch = example("vit", "ViTForImageClassification", ["vision.inputs"], **changes)
    (found,) = hf_hardattn.verify(model, batch).sites
    assert found.leak is None and not found.certified and found.kept_ratio == 1.0 and "not measured" in found.statement


def test_a_target_in_the_image_is_no_leak() -> None:
    """Masked image modelling compares its output with the pixels, the dropped ones too."""
    model, batch = example("vit", "ViTForMaskedImageModeling", {"vision.inputs": {"budget": 3}})
    assert hf_hardattn.verify(model, batch).sites[0].certified


def test_verify_refuses_what_it_cannot_compare() -> None:
    model, batch = example("vit", "ViTForImageClassification", {"vision.inputs": {"budget": 3}})
    with pytest.raises(HardAttentionError, match="returned a tuple; verify compares outputs by their names"):
        hf_hardattn.verify(model, {**batch, "return_dict": False})
    decoder, _ = example("llama", "LlamaForCausalLM", {"decoder.tokens.0": {"budget": 0.5}})
    ids = torch.randint(3, 50, (1, 6))
    cache = decoder(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(HardAttentionError, match="holds past_key_values; every call adds to a cache"):
        hf_hardattn.verify(decoder, {"input_ids": ids, "past_key_values": cache})


# -- broken on purpose -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "head", "site"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_leak_is_caught(architecture: Any, head: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A double that lets every kept row have a thousandth of the mean of all rows: the certificate says so."""
    model, batch = example(architecture, head, [site], budget=0.4)
    assert hf_hardattn.verify(model, batch).sites[0].certified
    honest = layers.keep_rows

    def leaky(hidden: Tensor, indices: Tensor) -> Tensor:
        return honest(hidden, indices) + 1e-3 * hidden.mean(1, keepdim=True)

    monkeypatch.setattr(layers, "keep_rows", leaky)
    (found,) = hf_hardattn.verify(model, batch).sites
    assert not found.certified and "LEAK" in found.statement and found.leak is not None and found.leak > 0


def test_a_constant_selection_is_caught() -> None:
    """It agrees with a model whose weights are shuffled, far above chance; a learned one must not."""
    model, batch = example("vit", "ViTForImageClassification", ["vision.inputs"], budget=3, scorer="first")
    found = randomised_weights(model, batch, seeds=2)["vision.inputs"]
    assert found["jaccard"] == pytest.approx(1.0) and found["chance"] < 0.3
    assert "position_constant" in {finding.kind for finding in find_collapse(model, batch)}


def test_shuffling_keeps_the_numbers_and_leaves_the_model() -> None:
    model, batch = example("vit", "ViTForImageClassification", ["vision.inputs"], budget=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = shuffled(model, seed=1)
    for name, value in other.state_dict().items():
        assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
        assert torch.equal(model.state_dict()[name], before[name])
    assert not torch.equal(other(**batch).logits, model(**batch).logits)


# -- the evaluator ---------------------------------------------------------------------------------------------------------------------


def test_evaluator_of_a_generated_text_scores_what_generate_said() -> None:
    model, batch = example("t5", "T5ForConditionalGeneration", {"encoder.tokens.0": {"budget": 0.5}})
    evaluator = PerturbationEvaluator(model, batch, answer_tokens=4)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    texts = model.generate(**inputs, max_new_tokens=4, num_beams=1, do_sample=False)
    with torch.no_grad():
        logs = model(**inputs, decoder_input_ids=texts[:, :-1]).logits.log_softmax(-1)
    for row in range(3):
        total, count = 0.0, 0
        for step, token in enumerate(texts[row, 1:].tolist()):
            total, count = total + float(logs[row, step, token]), count + 1
            if token == model.config.eos_token_id:
                break
        assert float(evaluator.full[row]) == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)
    assert evaluator.removal == "replace" and torch.allclose(evaluator(evaluator.places), evaluator.full)
    assert torch.equal(evaluator.places.sum(-1), batch["attention_mask"].sum(-1) - 1)  # all but </s> and padding


def test_evaluator_refuses() -> None:
    model, batch = example("vit", "ViTForImageClassification", ["vision.tokens.0"])
    with pytest.raises(HardAttentionError, match="removal='select' is not possible.*'vision.inputs' to be active"):
        PerturbationEvaluator(model, batch, removal="select")
    with pytest.raises(HardAttentionError, match="neither pixel_values nor a text"):
        PerturbationEvaluator(model, {"labels": batch["labels"]})
    headless, batch = example("vit", "ViTModel", ["vision.tokens.0"])
    with pytest.raises(HardAttentionError, match="ViTModel gives no answer"):
        PerturbationEvaluator(headless, batch)
    with pytest.raises(HardAttentionError, match="Identity is not supported"):
        PerturbationEvaluator(torch.nn.Identity(), batch)
    tokens, batch = example("t5", "T5ForTokenClassification", ["encoder.inputs"])
    with pytest.raises(HardAttentionError, match=r"logits of shape \(3, 11, 5\)"):
        PerturbationEvaluator(tokens, batch)


@pytest.mark.parametrize(("architecture", "head", "site"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_every_explanation_scores_every_place(architecture: Any, head: str, site: str) -> None:
    model, batch = example(architecture, head, [site], budget=0.4)
    evaluator = PerturbationEvaluator(model, batch, answer_tokens=3)
    for name, make in attribution.EXPLANATIONS.items():
        scores = make(evaluator)
        assert scores.shape == evaluator.places.shape and torch.isfinite(scores).all(), name
    best = top(attribution.selection(evaluator), evaluator.places, 0.4)
    assert torch.equal(best, evaluator.own())  # the selector's own ranking begins with what it keeps


# -- planted rationales ------------------------------------------------------------------------------------------------------------

SIDE, PATCH, CLASSES = 6, 4, 4


def planted_rows(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images of noise with the texture of their class in one patch, and in five others textures that mean nothing."""
    textures = torch.randn(8, PATCH, PATCH, generator=torch.Generator().manual_seed(7)).sign()
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    patches = 0.6 * torch.randn(rows, SIDE * SIDE, PATCH, PATCH, generator=generator)
    places = torch.rand(rows, SIDE * SIDE, generator=generator).argsort(-1)[:, :6]
    meaningless = textures[CLASSES + torch.randint(4, (rows, 5), generator=generator)]
    there = torch.cat((textures[labels][:, None], meaningless), 1)
    patches.scatter_add_(1, places[:, :, None, None].expand_as(there), there)
    pixels = patches.view(rows, 1, SIDE, SIDE, PATCH, PATCH).permute(0, 1, 2, 4, 3, 5).reshape(rows, 1, 24, 24)
    gold = torch.zeros(rows, 1 + SIDE * SIDE, dtype=torch.bool).scatter(1, places[:, :1] + 1, True)
    return pixels, labels, gold


def planted_model(seed: int, steps: int = 400) -> ViTForImageClassification:
    """A hard ViT trained on planted rows: soft for the first half, then with a budget that falls to 4 of 36.

    How well its attention explains it hangs on the seed and, with Adam as it comes, on a processor's rounding: a gradient that is zero
    but for rounding (a key bias's is) grows to whole steps. Without that bias, with a large epsilon and a rate that falls to zero, a
    change of the weights by 1e-7 moves what is measured of a model by 0.04 at most, for 0.17.
    """
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=24)
    config = ViTConfig(patch_size=PATCH, num_channels=1, num_labels=CLASSES, qkv_bias=False, **sizes)
    model = ViTForImageClassification(config).train()
    budget = {"start": 1.0, "end": 4 / 36, "steps": steps // 3}
    options = {"scorer": "mlp", "estimator": "simple", "estimator_options": {"sample": False}, "budget": budget}
    hf_hardattn.apply(model, {"sites": ["vision.inputs"], **options})
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, eps=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        hf_hardattn.set_step(model, max(0, step - steps // 2))
        pixels, labels, _ = planted_rows(128, generator)
        with hf_hardattn.soft(model) if step < steps // 2 else nullcontext():  # as at budget 1.0, in half the time
            loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_planted_rationales_order_the_explanations() -> None:
    """Oracle > hard > soft attention > random, in the mean of three models by every metric; integrated gradients beat random."""
    pixels, labels, gold = planted_rows(256, torch.Generator().manual_seed(2))
    signs = {"sufficiency": -1, "comprehensiveness": 1, "deletion": -1, "insertion": 1, "f1": 1, "iou": 1, "auprc": 1}
    signs |= {"sufficiency_of_size": -1, "comprehensiveness_of_size": 1}
    measured = []
    for seed in range(3):
        model = planted_model(seed)
        evaluator = PerturbationEvaluator(model, {"pixel_values": pixels})
        assert (evaluator.answer == labels).float().mean() > 0.9
        scores = {name: make(evaluator) for name, make in attribution.EXPLANATIONS.items()}
        scores["oracle"] = 2 * gold + scores["selection"]  # a rationale is a set: the rest as the selector has it
        measured.append(compare(evaluator, scores, human=gold, steps=18))  # two places a step
        assert torch.equal(own_sufficiency(evaluator), torch.zeros(256))
        sane = randomised_weights(model, {"pixel_values": pixels[:64]})["vision.inputs"]
        assert sane["jaccard"] < 0.35  # the choice needs what was learned
    found = {name: {metric: sum(one[name][metric] for one in measured) / 3 for metric in signs} for name in measured[0]}
    for metric, sign in signs.items():
        oracle, hard, attention, noise = (
            sign * found[name][metric] for name in ("oracle", "selection", "soft attention", "random")
        )
        # a selector that found everything equals the oracle: the answer's own law then breaks the tie, by a hair
        assert oracle > hard - 0.005 and hard > attention + 0.05 and attention > noise + 0.05, (metric, found)
    for metric in ("f1", "iou", "auprc"):
        assert found["oracle"][metric] == 1.0 > found["selection"][metric]
    assert found["integrated gradients"]["comprehensiveness"] > found["random"]["comprehensiveness"]


def test_numbers_are_those_of_the_modules() -> None:
    """``faithfulness`` and the ``evaluate`` modules, fed the same probabilities, say the same."""
    model, batch = example("vit", "ViTForImageClassification", ["vision.inputs"], budget=4)
    evaluator = PerturbationEvaluator(model, batch)
    scores, human = attribution.selection(evaluator), evaluator.places & (torch.arange(10) < 4)
    found = faithfulness(evaluator, scores, human=human, leave_one_out=attribution.leave_one_out(evaluator))
    kept = [top(scores, evaluator.places, ratio) for ratio in measures.THRESHOLDS]
    only = torch.stack([evaluator(mask) for mask in kept], 1).tolist()
    rest = torch.stack([evaluator(evaluator.places & ~mask) for mask in kept], 1).tolist()
    for name, values in (("sufficiency", only), ("comprehensiveness", rest)):
        module = evaluate.load(metrics.path(name))
        made = module.compute(predictions=values, references=evaluator.full.tolist())
        assert made is not None and made[name] == pytest.approx(found[name], abs=1e-6)
    assert found["auprc"] == pytest.approx(plausibility(scores, human, evaluator.places)["auprc"])
    assert -1 <= found["rank_correlation"] <= 1


# -- padding -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soft attention", "integrated gradients"])
@pytest.mark.parametrize(
    ("architecture", "head", "site"),
    [
        ("bert", "BertForSequenceClassification", "text.inputs"),
        ("llama", "LlamaForSequenceClassification", "decoder.inputs"),
        ("t5", "T5ForSequenceClassification", "encoder.inputs"),
        ("bart", "BartForSequenceClassification", "encoder.inputs"),
    ],
)
def test_the_padding_of_a_batch_changes_no_attribution(architecture, head, site, name):
    if name == "integrated gradients":
        pytest.importorskip("captum")
    model, batch = example(architecture, head, {site: {"budget": 4}})
    with torch.no_grad():  # a sharper model than a fresh one
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    together = attribution.EXPLANATIONS[name](PerturbationEvaluator(model, inputs))
    for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        alone = {key: value[row : row + 1, :length] for key, value in inputs.items()}
        found = attribution.EXPLANATIONS[name](PerturbationEvaluator(model, alone))[0]
        torch.testing.assert_close(together[row, :length], found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_measures_leave_the_mode_of_the_model(training):
    model, batch = example("vit", "ViTForImageClassification", {"vision.inputs": {"budget": 4}})
    model.train(training)
    model.classifier.eval()
    before = [module.training for module in model.modules()]
    PerturbationEvaluator(model, batch)
    randomised_weights(model, {"pixel_values": batch["pixel_values"]}, seeds=1)
    selection_diff(model, model, {"pixel_values": batch["pixel_values"]})
    assert [module.training for module in model.modules()] == before
