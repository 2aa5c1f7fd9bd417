"""``hf-hardattn explain`` and the page as a Space, on tiny models of every kind."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from examples import build as example
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip.processing_blip import BlipProcessor
from typer.testing import CliRunner

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.cli import app
from hf_hardattn.inspection import report
from hf_hardattn.inspection.attribution import EXPLANATIONS
from hf_hardattn.inspection.model_with_processor import ModelWithProcessor
from hf_hardattn.inspection.perturbation import PerturbationEvaluator
from hf_hardattn.inspection.playground import build
from hf_hardattn.inspection.report import explain
from hf_hardattn.inspection.sources import read_inputs
from hf_hardattn.inspection.space import requirements, write_space
from hf_hardattn.inspection.tokens import token_highlight

WORDS = "a red green dog cat on grass sleeps <script>".split()


def tokenizer(first: str, last: str) -> PreTrainedTokenizerFast:
    """Words, between ``first`` (none for T5) and ``last``."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", last, "[UNK]", first, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single=f"$A {last}", special_tokens=[(last, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", eos_token=last, unk_token="[UNK]", bos_token=first, sep_token=last
    )


def vit(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16)
    labels = {"id2label": {0: "<b>cat</b>", 1: "<b>dog</b>"}}
    model = ViTForImageClassification(ViTConfig(patch_size=4, num_channels=1, **sizes, **labels)).eval()
    hf_hardattn.apply(model, {"sites": {"vision.inputs": {"budget": 0.5}, "vision.tokens.0": {"budget": 0.5}}})
    model.save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    sites = {"encoder.inputs": {"budget": 0.5}, "decoder.cross.*": {"budget": 1, "scorer": "query_key"}}
    hf_hardattn.apply(model, {"sites": sites})
    model.save_pretrained(folder)
    tokenizer("[BOS]", "</s>").save_pretrained(folder)
    return folder


def blip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = dict(vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(bos_token_id=3, eos_token_id=1, sep_token_id=1, pad_token_id=0, encoder_hidden_size=16)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    config = BlipConfig(text_config=text, vision_config={**vision, "patch_size": 4}, projection_dim=16)
    model = BlipForConditionalGeneration(config).eval()
    sites = {"vision.inputs": {"budget": 0.5}, "text.cross.*": {"budget": 2, "scorer": "query_key"}}
    hf_hardattn.apply(model, {"sites": sites})
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 16, "width": 16})
    BlipProcessor(images, tokenizer("[BOS]", "[SEP]")).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        pixels = torch.randint(0, 255, (20, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        image = Image.fromarray(pixels.numpy())
        (image.convert("RGBA") if index == 1 else image).save(folder / f"{index}.png")
    return folder


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_explain_a_folder_of_images(tmp_path: Path, photos: Path) -> None:
    """Everything the page promises, measured too."""
    result = run("explain", vit(tmp_path / "vit"), "--input", photos, "--output", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    made = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert made.count("<img") == 2 * 3 + 2 and "&lt;b&gt;" in made and "<b>" not in made
    for expected in (
        "vision.inputs: keeps 50.0%. Given this selection, the 24 dropped positions cannot influence the output",
        "vision.tokens.0: keeps 50.0%",
        "through earlier layers (layer 0 mixed it into the kept tokens)",
        "sufficiency is 0 by construction",
        "integrated gradients",
        "of random selections",
    ):
        assert expected in made, expected
    assert len(made) < 300_000 and "<script" not in made and "3 inputs explained" in result.output


def test_explain_a_text_and_a_column(tmp_path: Path) -> None:
    folder = t5(tmp_path / "t5")
    evil = "a red <script> dog on grass"
    result = run("explain", folder, "--input", evil, "--no-measure", "--output", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    made = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in made and "&lt;script&gt;" in made and "<mark>" in made and "<s>" in made
    assert made.count("<img") == 1  # source x target
    table = tmp_path / "texts.csv"
    table.write_text("text,other\na red dog,1\na green cat sleeps,2\n")
    arguments = ["--input", table, "--column", "text", "--no-measure", "--output", tmp_path / "c.html"]
    result = run("explain", folder, *arguments)
    assert result.exit_code == 0 and "2 inputs explained" in result.output, result.output


def test_explain_a_caption(tmp_path: Path, photos: Path) -> None:
    bundle = ModelWithProcessor.load(str(blip(tmp_path / "blip")))
    made = explain(bundle, read_inputs(str(photos / "0.png")), measure=False)
    assert made.count("<img") == 3 and "For each word, the patches" in made
    # so small a model may leak nothing on a batch, and its queries may keep every patch between them; the page says which
    known = (
        "the vision&#x27;s layers (they mixed it into the kept rows)",
        "did not influence the output in this batch",
    )
    assert "text.cross.0: keeps " in made and any(
        text in made for text in (*known, "each position is kept by some query or head")
    )


def test_two_models_side_by_side(tmp_path: Path, photos: Path) -> None:
    """Another hard model shows what differs, a stock one its answers alone; models of other inputs are refused."""
    model = ViTForImageClassification.from_pretrained(vit(tmp_path / "one"))
    torch.nn.init.normal_(model.vit.embeddings.patch_embeddings.projection.weight)
    model.save_pretrained(tmp_path / "other")
    hf_hardattn.remove(model).save_pretrained(tmp_path / "stock")
    out = tmp_path / "r.html"
    always = ["--input", photos, "--no-measure", "--output", out, "--overwrite"]
    for name, images, rows in (("other", 3 * 3 + 1 + 2, 4), ("stock", 2 * 3 + 1, 3)):
        result = run("explain", tmp_path / "one", "--beside", tmp_path / name, *always)
        assert result.exit_code == 0, result.output
        made = out.read_text(encoding="utf-8")
        assert made.count("<img") == images and made.count("full attention</td>") == 4 * (rows // 2 + rows % 2)
        assert f"About this page: {name}" in made and ("only the first" in made) is (name == "other")
    result = run("explain", tmp_path / "one", "--beside", t5(tmp_path / "t5"), *always)
    assert result.exit_code and "one reads images and t5 reads texts" in str(result.exception)


def test_a_comparison_that_is_left_out_is_named(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(evaluator: Any) -> None:
        raise ImportError("install <captum>")

    monkeypatch.setitem(EXPLANATIONS, "integrated gradients", absent)
    monkeypatch.setattr(report, "rank_correlation", lambda *values: absent(values))
    made = explain(ModelWithProcessor.load(str(vit(tmp_path / "vit"))), read_inputs(str(photos / "0.png")))
    assert "Not compared with integrated gradients: install &lt;captum&gt;" in made
    assert "Not compared with leave-one-out: install &lt;captum&gt;" in made


def test_what_cannot_be_explained(tmp_path: Path, photos: Path) -> None:
    folder = vit(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(folder)
    soft = ModelWithProcessor(hf_hardattn.remove(model), None, "soft one")
    with pytest.raises(HardAttentionError, match="soft one has no hard-attention sites to explain"):
        explain(soft, [None])
    with pytest.raises(HardAttentionError, match="nothing to explain"):
        explain(ModelWithProcessor.load(str(folder)), [])
    with pytest.raises(HardAttentionError, match="t5 holds no tokenizer"):
        ModelWithProcessor(T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8)), None, "t5").encode(
            ["a"]
        )
    (tmp_path / "empty").mkdir()
    for given, column, message in (
        (tmp_path / "empty", None, "holds no image"),
        (folder / "config.json", None, "needs --column"),
        (folder / "model.safetensors", "text", "is not a data set"),
    ):
        with pytest.raises(HardAttentionError, match=message):
            read_inputs(str(given), column)
    (tmp_path / "t.csv").write_text("text\nhello\n")
    with pytest.raises(HardAttentionError, match="no column 'txt' in .*; it has: text"):
        read_inputs(str(tmp_path / "t.csv"), "txt")
    assert read_inputs("no such file, so a text") == ["no such file, so a text"]
    with pytest.raises(HardAttentionError, match=r"missing\.png does not exist"):
        read_inputs("missing.png")
    with pytest.raises(HardAttentionError, match=r"input 2 of 2 is not an image \(str\); vit reads images"):
        ModelWithProcessor.load(str(folder)).encode([Image.new("L", (4, 4)), "none.png"])
    assert len(read_inputs(str(photos), limit=2)) == 2
    (photos / "table.csv").write_text("image,text\n0.png,a cat\nnone.png,a dog\n")
    first, missing = read_inputs(str(photos / "table.csv"), "image")
    assert first.size == read_inputs(str(photos / "0.png"))[0].size and missing == "none.png"


def test_texts_and_images_of_other_families_are_explained_or_refused_in_words(tmp_path: Path, photos: Path) -> None:
    """A text encoder, a tower without CLS that is saved with half a processor, and models without an answer of their own."""
    tokens, tiny = tokenizer("[CLS]", "[SEP]"), {"num_hidden_layers": 2, "vocab_size": 40, "pad_token_id": 0}
    image, text = Image.open(next(photos.rglob("*.png"))), " ".join(WORDS[:5])
    bundles = {}
    for family, head, processor, changes in (
        ("bert", "BertForSequenceClassification", tokens, tiny),
        ("bert", "BertModel", tokens, tiny),
        ("llama", "LlamaForCausalLM", tokens, {**tiny, "num_key_value_heads": 3, "attention_dropout": 0.0}),
        (
            "siglip",
            "SiglipForImageClassification",
            ViTImageProcessorPil(size={"height": 12, "width": 12}),
            {"num_channels": 3},
        ),
    ):
        model = hf_hardattn.apply(example(family, head, **changes).model)
        hf_hardattn.save(model, tmp_path / head)
        processor.save_pretrained(tmp_path / head)
        bundles[head] = ModelWithProcessor.load(str(tmp_path / head))
    made = explain(bundles["BertForSequenceClassification"], [text])
    assert "text.tokens" in made and "<mark>" in made
    page = explain(bundles["LlamaForCausalLM"], [text, " ".join(WORDS[2:5])])
    assert page.count('class="hfha"') == 2 and "How faithful that is, measured" in page
    assert "vision.tokens" in explain(bundles["SiglipForImageClassification"], [image], measure=False)
    with pytest.raises(HardAttentionError, match="BertModel neither classifies nor generates text"):
        explain(bundles["BertModel"], [text])


@pytest.mark.parametrize("site", ["decoder.inputs", "decoder.tokens.0", "decoder.self.1"])
def test_an_answer_behind_a_prompt_has_the_probability_with_which_it_was_written(site: str) -> None:
    torch.manual_seed(0)
    model = example("llama", "LlamaForCausalLM", pad_token_id=0, num_key_value_heads=3, attention_dropout=0.0).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    hf_hardattn.apply(model, {"sites": [site], "budget": 0.5, "scorer": "linear"})
    ids = torch.randint(2, 40, (2, 7)).masked_fill(torch.arange(7) < torch.tensor([[0], [3]]), 0)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    evaluator = PerturbationEvaluator(model.eval(), batch, answer_tokens=5)
    written = model.generate(
        **batch, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logs = torch.stack(written.logits, 1).log_softmax(-1).gather(-1, written.sequences[:, 7:, None])[..., 0]
    expected = ((logs * evaluator.counted).sum(-1) / evaluator.counted.sum(-1)).exp()
    torch.testing.assert_close(evaluator.full, expected)
    assert (evaluator(evaluator.places & False) - expected).abs().max() > 1e-3
    if site == "decoder.inputs":
        torch.testing.assert_close(evaluator(evaluator.own()), expected)


def test_every_form_of_a_checkpoint_is_explained(tmp_path: Path) -> None:
    """Selectors alone take the base's tokenizer; an adapter is seen through."""
    from peft import LoraConfig, get_peft_model

    hard = T5ForConditionalGeneration.from_pretrained(t5(tmp_path / "hard"))
    tokenizer("[BOS]", "</s>").save_pretrained(tmp_path / "base")
    hf_hardattn.save(hard, tmp_path / "selectors", selectors_only=True, base_model=str(tmp_path / "base"))
    adapted = get_peft_model(hard, LoraConfig(target_modules=["q"], modules_to_save=["selector", "input_selector"]))
    hf_hardattn.save(adapted, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    soft = hf_hardattn.remove(T5ForConditionalGeneration.from_pretrained(tmp_path / "hard"))
    soft.save_pretrained(tmp_path / "base")
    for form in ("selectors", "adapter"):
        out = tmp_path / f"{form}.html"
        result = run("explain", tmp_path / form, "--input", "red dog", "--no-measure", "--output", out)
        assert result.exit_code == 0, result.output
        assert "cannot influence the output" in out.read_text() and "<mark>" in out.read_text()


def test_budget_moves_and_comes_back(tmp_path: Path, photos: Path) -> None:
    bundle = ModelWithProcessor.load(str(vit(tmp_path / "vit")))
    batch = bundle.encode(read_inputs(str(photos / "0.png")))
    before = bundle.predict(batch).recording.summary()
    with bundle.at_budget(0.25):
        inside = bundle.predict(batch).recording.summary()
    assert inside[0]["kept_ratio"] == pytest.approx(0.25) and bundle.predict(batch).recording.summary() == before
    with pytest.raises(HardAttentionError, match="budget=2.5 is out of range"), bundle.at_budget(2.5):
        pass


def test_space_is_ready_to_push(tmp_path: Path) -> None:
    """``app.py`` runs on what the folder holds, the front matter is a Space's, and requirements name no local thing."""
    model = vit(tmp_path / "tiny")
    (model / "training_args.bin").write_bytes(b"a pickle")
    result = run("demo", "--space", tmp_path / "space", "--model", model)
    assert result.exit_code == 0, result.output
    space = tmp_path / "space"
    assert sorted(file.name for file in space.iterdir()) == [
        "README.md",
        "app.py",
        "hf_hardattn",
        "models",
        "requirements.txt",
    ]
    ast.parse((space / "app.py").read_text())
    assert "['models/0-tiny']" in (space / "app.py").read_text() and (space / "models/0-tiny/config.json").is_file()
    assert not (space / "models/0-tiny/training_args.bin").exists()
    card = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["sdk_version"].startswith("6.")
    needs = requirements()
    assert any(need.startswith("transformers") for need in needs) and any(
        need.startswith("matplotlib") for need in needs
    )
    assert not any("file:" in need or need.startswith(("gradio", "pytest")) for need in needs)
    with pytest.raises(HardAttentionError, match="space is not empty"):
        write_space(space, [str(model)])
    with pytest.raises(HardAttentionError, match="no model is named"):
        write_space(tmp_path / "other", [])


def test_the_page_wants_hard_models(tmp_path: Path) -> None:
    with pytest.raises(HardAttentionError, match="no model is named; the page shows"):
        build([])
    model = ViTForImageClassification.from_pretrained(vit(tmp_path / "vit"))
    hf_hardattn.remove(model).save_pretrained(tmp_path / "soft")
    with pytest.raises(HardAttentionError, match="soft has no hard_attention in its config.json: it is a soft model"):
        build([str(tmp_path / "soft")])


def test_another_budget_is_kept_inside_the_block_and_the_own_one_behind_it() -> None:
    bundle = ModelWithProcessor.load("sample")
    (selector,) = hf_hardattn.selectors(bundle.model).values()

    def kept() -> int:
        with torch.inference_mode(), hf_hardattn.record(bundle.model) as selections:
            bundle.model(pixel_values=torch.rand(1, 3, 64, 64))
        return selections["vision.inputs"][0].slots

    own = kept()
    with bundle.at_budget(0.5):
        assert kept() == 33 and selector.config.budget == 0.5
    assert kept() == own == 10


@pytest.mark.parametrize("given", [None, 3, ["a"], Image.new("L", (4, 4)), " "])
def test_what_is_not_a_text_is_refused_in_words(tmp_path: Path, given: Any) -> None:
    bundle = ModelWithProcessor.load(str(t5(tmp_path / "t5")))
    with pytest.raises(HardAttentionError, match=r"input 2 of 2 is (empty|not a text \(\w+\)); t5 reads texts"):
        bundle.encode(["a dog", given])


def test_a_photograph_is_read_upright(tmp_path: Path) -> None:
    """Cameras store an orientation instead of turning the pixels; pipelines and data sets turn them."""
    stored, upright = tmp_path / "stored.jpg", Image.new("L", (16, 8), 20)
    upright.paste(230, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, exif=exif, quality=95)
    (image,) = read_inputs(str(stored))
    assert image.size == (16, 8) and image.getpixel((2, 4)) > 200 > 50 > image.getpixel((13, 4))


def test_what_was_cut_off_is_not_shown_as_dropped() -> None:
    """The tokenizer read two words; the rest of the text was no candidate."""
    made = example("t5", "T5ForConditionalGeneration")
    model = hf_hardattn.apply(made.model, {"sites": ["encoder.inputs"], "budget": 1, "scorer": "first"})
    with hf_hardattn.record(model) as recording:
        model(input_ids=torch.tensor([[5, 6, 1]]), labels=torch.tensor([[5]]))
    page = token_highlight(recording, "hello world and so on", [(0, 5), (6, 11), (0, 0)])
    assert "<mark>hello</mark>" in page and "<s> world</s>" in page and "so on" not in page
    assert "10 characters after these were cut off" in page
