"""The scripts' tasks on tiny models and files: each learns, predicts and scores; and what is wrong with the data is said in time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, Features, Image, List, Value, Video
from PIL import Image as Pillow
from test_scripts import WORDS, squares, tokenizer
from test_videos import write_video
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, BlipConfig, LlamaConfig, T5Config, ViTConfig
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip.processing_blip import BlipProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import hf_hardattn
from hf_hardattn.functional.pooling import mean_rows
from hf_hardattn.hub.building import model_class
from hf_hardattn.training import finetuning
from hf_hardattn.training.evaluation import compare
from hf_hardattn.training.finetuning._encoders import encoders
from hf_hardattn.training.finetuning.causal_lm import decoders
from hf_hardattn.training.loop import Task
from hf_hardattn.training.rows import label_number, label_numbers
from hf_hardattn.training.sharding import without_peft
from hf_hardattn.training.videos import read_frames

TEXT = {"vocab_size": 21, "bos_token_id": 3, "eos_token_id": 1, "sep_token_id": 1, "pad_token_id": 0}
T5 = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0}
SIZES = {"hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 3, "num_hidden_layers": 2}
ROWS = 6


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each family, without weights."""
    path = tmp_path_factory.mktemp("models")
    T5Config(vocab_size=13, d_model=26, d_kv=6, d_ff=39, num_layers=2, num_heads=3, **T5).save_pretrained(path / "t5")
    tokenizer().save_pretrained(path / "t5")
    BertConfig(**{**TEXT, **SIZES}).save_pretrained(path / "encoder")
    tokenizer().save_pretrained(path / "encoder")
    LlamaConfig(num_key_value_heads=1, **{**TEXT, **SIZES}).save_pretrained(path / "decoder")
    tokenizer().save_pretrained(path / "decoder")
    ViTConfig(image_size=12, patch_size=4, **SIZES).save_pretrained(path / "vit")
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(path / "vit")
    vision = {"image_size": 12, "patch_size": 4, **SIZES}
    text = {
        "max_position_embeddings": 31,
        **TEXT,
        **SIZES,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=13).save_pretrained(path / "blip")
    BlipProcessor(BlipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer()).save_pretrained(path / "blip")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with the columns of every task."""
    path = tmp_path_factory.mktemp("data")
    rows = []
    for i, (image, colour) in enumerate(squares(path, ROWS)):
        context = f"big {colour} square on grey"
        rows.append(
            {
                "image": str(image.relative_to(path)),
                "label": colour,
                "caption": f"{colour} {WORDS[3 + i % 2]}",
                "source": context,
            }
            | {"target": colour, "text": context, "question": "on grey", "context": context, "answer": colour}
        )
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(name: str, models: Path, data: Path, weights: int = 0, family: str | None = None, **flags: Any) -> Task:
    """Set the task up as the script of a family does, its first by default."""
    task = finetuning.load(name)
    given = {"model_name_or_path": str(models / (family or task.families[0])), "train_file": str(data / "rows.jsonl")}
    given |= {"validation_file": given["train_file"], "cache_dir": str(data / "cache"), "cpu": True}
    given |= {"max_target_length": 9} if hasattr(task.Arguments, "max_target_length") else {}
    torch.manual_seed(weights)
    return task(task.Arguments(**{**given, **flags}), Accelerator(cpu=True)).setup()


SITES = {
    "decoder": "decoder.tokens.0",
    "encoder": "text.tokens.0",
    "t5": "encoder.inputs",
    "vit": "vision.inputs",
    "blip": "vision.tokens.0",
}
METRIC = {
    "image_classification": "accuracy",
    "text_classification": "accuracy",
    "translation": "chrf",
    "summarisation": "rougeL",
    "extractive_question_answering": "exact_match",
    "generative_question_answering": "f1",
    "causal_lm": "exact_match",
    "captioning": "cider_regex_tokens",
    "visual_question_answering": "exact_match",
    "image_text_retrieval": "image_to_text_recall@1",
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for name in METRIC for family in finetuning.load(name).families]
)
def test_task_learns_and_is_scored(family: str, name: str, models: Path, data: Path) -> None:
    """Six examples are learned by heart: the loss falls, and the metric says so, hard and soft."""
    flags = {"metrics": ["cider"]} if name == "captioning" else {}
    weights = 4 if name == "image_text_retrieval" else 0  # of seeds 0 to 4, 2 and 4 learn it in 30 epochs
    task = make(name, models, data, weights, family, sites=[SITES[family]], budget="0.7", **flags)
    assert task.name == name
    loader = DataLoader(task.train, batch_size=3, collate_fn=task.collate)
    model, optimizer = task.model.train(), torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30 if name == "image_text_retrieval" else 15):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    accelerator = Accelerator(cpu=True)
    found = compare(accelerator, model, accelerator.prepare(loader), task.predict, task.score)
    assert set(found) == {"hard", "soft"} and METRIC[name] in found["soft"]
    assert found["hard"]["examples"] == ROWS and 0 < found["hard"]["kept_ratio"][SITES[family]] < 1
    assert found["hard"][METRIC[name]] > 0.0


def test_embeddings_learn_from_the_whole_text_and_load_as_the_encoder(models: Path, data: Path, tmp_path: Path) -> None:
    """The loss falls towards the soft model's embeddings; what is saved is the stock class, with the pooler that it had."""
    with pytest.raises(hf_hardattn.HardAttentionError, match="learns from the embeddings of a trained model"):
        make(
            "sentence_embeddings",
            models,
            data,
            model_name_or_path=None,
            config_name=str(models / "encoder"),
            processor_name=str(models / "encoder"),
        )
    stock = BertModel(BertConfig(**{**TEXT, **SIZES, "initializer_range": 0.5}))
    stock.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    flags = {
        "model_name_or_path": str(tmp_path / "base"),
        "sites": ["text.tokens.0"],
        "budget": "0.5",
        "query_column": "label",
    }
    task = make("sentence_embeddings", models, data, **flags)
    batch = task.collate([task.train[i] for i in range(ROWS)])
    model, optimizer = task.model.train(), torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    found, wanted, loss = task.predict(model.eval(), batch)
    assert task.score(found, wanted)["recall@10"] == 100.0 and len(loss) == ROWS
    model.save_pretrained(tmp_path / "hard")
    again = AutoModel.from_pretrained(tmp_path / "hard").eval()
    assert type(again) is BertModel and torch.equal(again.pooler.dense.weight, stock.pooler.dense.weight)
    hidden = again(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(
        torch.nn.functional.normalize(mean_rows(hidden, batch["attention_mask"]), dim=-1), torch.stack(found)
    )


def test_estimators_add_their_terms_to_the_loss_of_embeddings(models: Path, data: Path, tmp_path: Path) -> None:
    """The loss comes from a hook; a score-function estimator finds it there, and what needs further passes is refused before training."""
    BertModel(BertConfig(**{**TEXT, **SIZES, "initializer_range": 0.5})).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    flags: dict[str, Any] = {"model_name_or_path": str(tmp_path), "sites": ["text.tokens.0"], "budget": "0.5"}
    flags |= {"scorer": "linear", "baseline": "none"}
    task = make("sentence_embeddings", models, data, **flags, estimator="reinforce")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = task.model.train()(**task.collate([task.train[i] for i in range(ROWS)]))
    output.loss.backward()
    (selector,) = hf_hardattn.selectors(task.model).values()
    assert selector.scorer.weight.grad.abs().max() > 1e-6
    for other in ("rloo", "distil"):
        with pytest.raises(hf_hardattn.HardAttentionError, match="several forward passes per step"):
            make("sentence_embeddings", models, data, **flags, estimator=other)


def test_registry_names_files_and_families() -> None:
    assert set(METRIC) <= set(finetuning.names())
    assert finetuning.choose([], "t5") is finetuning.load("translation")
    assert finetuning.choose([], "encoder") is finetuning.load("text_classification")
    for family, architecture, name in (
        ("t5", "T5ForSequenceClassification", "text_classification"),
        ("encoder", "DistilBertForSequenceClassification", "text_classification"),
        ("encoder", "BertModel", "sentence_embeddings"),
    ):
        assert finetuning.choose([], family, architecture) is finetuning.load(name)
    assert finetuning.choose(["--task", "summarisation"], "t5") is finetuning.load("summarisation")
    assert finetuning.choose([], "blip", "BlipForImageTextRetrieval") is finetuning.load("image_text_retrieval")
    with pytest.raises(
        hf_hardattn.HardAttentionError, match="unknown task of vit 'captioning'; known: 'image_classification'"
    ):
        finetuning.choose(["--task=captioning"], "vit")
    with pytest.raises(hf_hardattn.HardAttentionError, match="unknown task 'caption'; .* Did you mean 'captioning'"):
        finetuning.load("caption")


def test_the_model_types_of_a_command_are_those_of_configurations() -> None:
    """A family's name is ours, a model type is Transformers': XLM-RoBERTa has both."""
    assert "xlm-roberta" in encoders() and "llama" in decoders()
    for model_type in (*encoders(), *decoders()):
        assert AutoConfig.for_model(model_type).model_type == model_type
    for name in ("text_classification", "sentence_embeddings"):
        task = finetuning.load(name)
        assert set(task.model_types()) <= set(task.classes)


@pytest.mark.parametrize("name", finetuning.names())
def test_what_a_task_saves_can_be_loaded(name: str) -> None:
    """``load`` looks a class up by the name in config.json, in few packages."""
    trained = finetuning.load(name).model_class
    if not trained.__name__.startswith("Auto"):  # those are Transformers' own
        assert issubclass(trained, model_class(trained.__name__, "config.json"))


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for name in finetuning.names() for family in finetuning.load(name).families]
)
def test_an_adapter_that_a_task_saves_can_be_loaded(
    family: str, name: str, models: Path, data: Path, videos: Path, tmp_path: Path
) -> None:
    """LoRA, whatever the task does to the model: the folder alone gives back the hard model with the trained weights."""
    shutil.copytree(models / family, tmp_path / "base")
    flags: dict[str, Any] = {"model_name_or_path": str(tmp_path / "base"), "family": family}
    if name.startswith("video"):
        data, flags = videos, flags | {"num_frames": 4}
    if name == "sentence_embeddings":
        BertModel(BertConfig(**TEXT, **SIZES)).save_pretrained(tmp_path / "base")
    else:
        make(name, models, data, **flags).model.save_pretrained(tmp_path / "base")
    task = make(name, models, data, **flags, use_peft=True, sites=[SITES[family]], budget="0.7", scorer="linear")
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    task.model.save_pretrained(tmp_path / "adapter")
    loaded = hf_hardattn.load(tmp_path / "adapter")
    assert list(hf_hardattn.selectors(loaded)) == [SITES[family]]
    found, saved = dict(without_peft(loaded).named_parameters()), dict(without_peft(task.model).named_parameters())
    assert found.keys() == saved.keys()
    for key, value in saved.items():  # PEFT's original_module is what it would go back to
        assert torch.equal(found[key], value) or ".original_module." in key, key


def test_frozen_features_are_the_images(models: Path, data: Path, tmp_path: Path) -> None:
    """The tower runs once an image; loss, text and the other weights' gradients are those of the images themselves."""
    flags = {"freeze": ["vision_model"], "sites": ["text.cross.*"], "budget": "0.5"}
    file = tmp_path / "features.safetensors"
    whole, short = (
        make("captioning", models, data, **flags),
        make("captioning", models, data, **flags, vision_features=str(file)),
    )
    assert not any(p.requires_grad for p in short.model.vision_model.parameters())
    rows = [whole.train[i] for i in range(ROWS)]
    images, features = whole.collate(rows), short.collate(rows)
    assert images["pixel_values"].dim() == 4 and features["pixel_values"].shape == (ROWS, 10, 24)
    for task, batch in ((whole, images), (short, features)):
        torch.manual_seed(1)
        task.model.train()(**batch).loss.backward()
    for (key, a), b in zip(whole.model.named_parameters(), short.model.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=key)
    assert whole.predict(whole.model.eval(), images)[0] == short.predict(short.model.eval(), features)[0]
    again = make("captioning", models, data, **flags, vision_features=str(file))
    torch.testing.assert_close(again.collate(rows)["pixel_values"], features["pixel_values"])
    torch.testing.assert_close(
        short.model.eval()(**images).logits, short.model(**features).logits
    )  # it still reads images


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "of the vision tower is trained, so its features change; .* Add --freeze vision_model"),
        (
            {"freeze": ["vision_model"], "sites": ["vision.inputs"]},
            "site 'vision.inputs' selects inside the vision tower",
        ),
        ({"freeze": ["vision_tower"]}, "unknown module 'vision_tower' at '--freeze'; known: .*'vision_model'"),
    ],
)
def test_features_of_a_changing_tower_are_refused(
    flags: Any, message: str, models: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(hf_hardattn.HardAttentionError, match=message):
        make("captioning", models, data, vision_features=str(tmp_path / "f.safetensors"), **flags)


def test_features_of_another_tower_are_refused(models: Path, data: Path, tmp_path: Path) -> None:
    flags = {"vision_features": str(tmp_path / "f.safetensors"), "freeze": ["vision_model"]}
    make("captioning", models, data, **flags)
    with pytest.raises(hf_hardattn.HardAttentionError, match="holds the features of another vision tower"):
        make("captioning", models, data, weights=3, **flags)


def test_wrong_pairs_are_never_equal_texts() -> None:
    """A batch of equal captions has no wrong pair; the contrastive part is then exactly zero apart from its entropy."""
    model_class = finetuning.load("image_text_retrieval").model_class
    text = {
        "max_position_embeddings": 31,
        **TEXT,
        **SIZES,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = BlipConfig(
        text_config=text, vision_config={"image_size": 12, "patch_size": 4, **SIZES}, image_text_hidden_size=13
    )
    model = model_class(config)
    batch = {"pixel_values": torch.randn(4, 3, 12, 12), "input_ids": torch.tensor([[3, 4, 1]] * 4)}
    same = model(**batch, labels=torch.zeros(4, dtype=torch.long)).loss
    matching = torch.nn.functional.cross_entropy(model(**batch).itm_score, torch.ones(4, dtype=torch.long))
    assert same.isfinite() and same > matching / 3
    one_other = model(**batch, labels=torch.tensor([0, 0, 0, 1])).loss
    assert one_other.isfinite() and one_other > same - 1


def test_recall_counts_equal_texts_and_both_ways() -> None:
    from hf_hardattn.training.finetuning._retrieval import _recalls

    right = torch.tensor([[True, False], [True, False], [False, True]])
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    found = _recalls(scores, right)
    assert found["image_to_text_recall@1"] == pytest.approx(200 / 3)  # the second image takes the wrong text
    assert found["text_to_image_recall@1"] == 50.0 and found["text_to_image_recall@5"] == 100.0


def test_reranking_adds_the_matching_head_to_the_embeddings() -> None:
    """Embeddings that part two texts clearly are not overruled by a head that hardly prefers one; those that do not, are."""
    from hf_hardattn.training.finetuning._retrieval import TEMPERATURE, Item, RetrievalTask

    odds = torch.tensor([0.0, 0.5, 0.0])  # of the three texts, whose only token is their number

    def match(ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack((torch.zeros(len(ids)), odds[ids[:, 0]]), 1)

    accelerator = SimpleNamespace(
        unwrap_model=lambda model: model, device=torch.device("cpu"), process_index=0, num_processes=1
    )
    task = SimpleNamespace(
        args=SimpleNamespace(rerank=2),
        accelerator=accelerator,
        model=SimpleNamespace(match=match),
        pad=lambda rows: (torch.tensor(rows), torch.ones(len(rows), 1)),
    )
    similarity = torch.tensor([[0.30, 0.20, -0.9], [0.30, 0.29, -0.9]])
    items = [Item(torch.zeros(1), torch.zeros(1), torch.zeros(3, 1), [0]) for _ in range(2)]
    better = RetrievalTask._again(task, similarity, items, [[0], [1], [2]])
    assert better[:, :2].argmax(1).tolist() == [0, 1]
    torch.testing.assert_close(
        better[:, :2] - better[:, :1],
        similarity[:, :2] / TEMPERATURE + odds[:2] - similarity[:, :1] / TEMPERATURE,
        atol=1e-3,
        rtol=0,
    )


def write(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train_file": str(folder / "bad.jsonl"), "validation_file": str(folder / "bad.jsonl")}


def bad(folder: Path, **changes: Any) -> dict[str, str]:
    """Two good rows and a third with ``changes``."""
    rows = [{"image": "0.png", "label": "a", "caption": "red", "source": "red", "target": "blue"}]
    rows = [*rows, {**rows[0], "label": "b"}, {**rows[0], **changes}]
    Pillow.new("RGB", (12, 12)).save(folder / "0.png")
    Pillow.new("RGB", (10, 14)).save(folder / "odd.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    return write(folder, rows)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("captioning", {"image": "text.png"}, r"row 2 of the training data .*text.png cannot be read \(UnidentifiedImageError.*remove the row"),
        ("captioning", {"image": "half.png"}, r"row 2 of the training data .*half.png cannot be read"),
        ("captioning", {"image": "none.png"}, r"row 2 of the training data .*none.png cannot be read \(FileNotFoundError"),
        ("captioning", {"image": None}, r"row 2 of the training data .*the cell is empty"),
        ("captioning", {"caption": "  "}, "row 2 of the training data .*caption='  ' is not a text; .* Fill it"),
        ("image_classification", {"image": "text.png"}, "row 2 of the training data .*cannot be read"),
        ("image_classification", {"label": None}, "row 2 of the training data .*label None is not one of the model's 2 labels; it has: 'a', 'b'"),
        ("translation", {"target": None}, "row 2 of the training data .*target=None is not a text"),
    ],
)  # fmt: skip
def test_bad_row_is_named_before_training(task: str, changes: Any, message: str, models: Path, tmp_path: Path) -> None:
    files = bad(tmp_path, **changes)
    with pytest.raises(hf_hardattn.HardAttentionError, match=message):
        make(task, models, tmp_path, **files)


def test_mixed_sizes_without_resizing(models: Path, tmp_path: Path) -> None:
    plain = tmp_path / "vit"
    ViTConfig(image_size=12, patch_size=4, **SIZES).save_pretrained(plain)
    ViTImageProcessorPil(do_resize=False).save_pretrained(plain)
    with pytest.raises(
        hf_hardattn.HardAttentionError,
        match="row 2 of the training data .*10x14 pixels, but the first is 12x12; .* do_resize",
    ):
        make("image_classification", tmp_path, tmp_path, **bad(tmp_path, image="odd.png"))
    task = make("image_classification", models, tmp_path, **bad(tmp_path, image="odd.png"))  # this one resizes
    assert task.collate([task.train[i] for i in range(3)])["pixel_values"].shape == (3, 3, 12, 12)


def test_text_longer_than_the_model(models: Path, data: Path) -> None:
    with pytest.raises(
        hf_hardattn.HardAttentionError,
        match="max_target_length=40 is more than the 31 positions .* Set --max_target_length to 31",
    ):
        make("captioning", models, data, max_target_length=40)
    task = make("captioning", models, data, max_target_length=31)
    row = {**task.train[0], "caption": "red " * 50}
    batch = task.collate([row])
    assert batch["input_ids"].shape == (1, 31) and batch["input_ids"][0, [0, -1]].tolist() == [
        3,
        1,
    ]  # cut, and still ended
    assert task.model(**batch).loss.isfinite()


def test_missing_column_and_empty_split(models: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        hf_hardattn.HardAttentionError,
        match="no column 'words' in the data; it has: .*'caption'.* Specify it with --caption_column",
    ):
        make("captioning", models, data, caption_column="words")
    with pytest.raises(hf_hardattn.HardAttentionError, match="the training data has no rows; .*--max_\\*_samples"):
        make("captioning", models, data, max_train_samples=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "rows.jsonl holds no rows; .* Check the file"),
        ("rows.csv", "", "rows.csv holds no rows"),
        ("rows.csv", "source,target\n", "rows.csv holds no rows"),
        ("rows.jsonl", '{"source": "a", "target": "b"}\n{"source": "a", "targ', r"rows.jsonl cannot be read as json \(.*line|row|column.*Fix the file"),
        ("rows.csv", 'source,target\na,b\na,b,c,d\n', r"rows.csv cannot be read as csv \(.*line 3.*Fix the file"),
        ("photos/none.txt", "x", "photos holds no rows"),
    ],
)  # fmt: skip
def test_files_without_rows_or_with_broken_ones(
    name: str, content: str, message: str, models: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    where = (
        {"train_file": str(path)} if path.parent == tmp_path else {"train_dir": str(path.parent), "train_file": None}
    )
    flags = {**where, "validation_file": None, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(hf_hardattn.HardAttentionError, match=message):
        make("translation" if path.parent == tmp_path else "image_classification", models, tmp_path, **flags)


def test_validation_is_checked_before_training_too(models: Path, tmp_path: Path) -> None:
    """A label that training does not have, a picture that is none: the row is named, of the validation data."""
    good = bad(tmp_path)["train_file"]
    other = tmp_path / "validation.jsonl"
    for changes, message in (
        (
            {"label": "c"},
            "row 1 of the validation data .*label 'c' is not one of the model's 2 labels; it has: 'a', 'b'",
        ),
        ({"image": "text.png"}, "row 1 of the validation data .*text.png cannot be read"),
    ):
        row = {"image": "0.png", "label": "a"}
        other.write_text("".join(json.dumps(r) + "\n" for r in (row, {**row, **changes})))
        flags = {"train_file": good, "validation_file": str(other), "cache_dir": str(tmp_path / "cache")}
        with pytest.raises(hf_hardattn.HardAttentionError, match=message):
            make("image_classification", models, tmp_path, **flags)
    flags = {"train_file": good, "validation_file": good, "max_eval_samples": 0}
    with pytest.raises(hf_hardattn.HardAttentionError, match="the validation data has no rows"):
        make("image_classification", models, tmp_path, **flags)


def test_answer_outside_its_context(models: Path, data: Path, tmp_path: Path) -> None:
    row = {"question": "on", "context": "big red square", "answers": {"text": ["red"], "answer_start": [4]}}
    wrong = {**row, "answers": {"text": ["red"], "answer_start": [5]}}
    with pytest.raises(
        hf_hardattn.HardAttentionError,
        match="row 1 of the training data .*'red' does not occur in the context at character 5",
    ):
        make("extractive_question_answering", models, data, **write(tmp_path, [row, wrong]))
    with pytest.raises(hf_hardattn.HardAttentionError, match="row 1 of the training data .* holds no answer"):
        make(
            "generative_question_answering",
            models,
            data,
            **write(tmp_path, [row, {**row, "answers": {"text": [], "answer_start": []}}]),
        )
    task = make("extractive_question_answering", models, data, **write(tmp_path, [row]), max_source_length=4)
    batch = task.collate([task.train[0]])
    assert batch["start_positions"].tolist() == [4]  # cut off: it stands behind the last token, where no loss counts it
    assert task.predict(task.model.eval(), batch)[1] == ["[the answer was cut off]"]


def test_label_outside_the_map() -> None:
    names = ClassLabel(names=["cat", "dog"])
    stale = ViTConfig(id2label={0: "a", 1: "dog"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    assert label_numbers(stale) == {"a": 0, "dog": 1}  # a base's label2id does not name this model's classes
    assert label_number(1, names, {"dog": 7}) == 7 and label_number(3, None, {"3": 2}) == 2
    with pytest.raises(
        hf_hardattn.HardAttentionError, match="label 'cat' is not one of the model's 1 labels; it has: 'dog'"
    ):
        label_number(0, names, {"dog": 7})
    with pytest.raises(hf_hardattn.HardAttentionError, match="label -1 is not one of the model's 1 labels"):
        label_number(-1, names, {"dog": 7})


def test_tail_is_counted_once(models: Path, data: Path) -> None:
    """Batches of four of six rows: the last one is short, and no row counts twice."""
    task = make("image_classification", models, data)
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(task.validation, batch_size=4, collate_fn=task.collate))
    found = compare(accelerator, task.model, loader, task.predict, task.score)
    assert found["soft"]["examples"] == ROWS


DISAGREE = """
import sys
from accelerate import Accelerator
from datasets import Dataset
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.training.rows import check_rows, same_everywhere

accelerator = Accelerator(cpu=True)
rows = [{"caption": str(i)} for i in range(5)]
same_everywhere(accelerator, {"training": Dataset.from_list(rows)})
if accelerator.process_index == 1:
    rows[3]["caption"] = "other"
for check in (
    lambda: same_everywhere(accelerator, {"training": Dataset.from_list(rows)}),
    lambda: same_everywhere(accelerator, {"training": Dataset.from_list(rows[: 2 + accelerator.process_index])}),
    lambda: check_rows(accelerator, Dataset.from_list(rows), "training", refuse),
):
    try:
        check()
    except HardAttentionError as error:
        print(f"{accelerator.process_index}: {error}", flush=True)
"""


@pytest.mark.multiprocess
def test_processes_that_disagree_on_data_all_say_so(tmp_path: Path) -> None:
    script = tmp_path / "disagree.py"
    refuse = "def refuse(row):\n    if row['caption'] == '3':\n        raise HardAttentionError('bad caption')\n"
    script.write_text(
        DISAGREE.replace("accelerator = Accelerator(cpu=True)\n", "accelerator = Accelerator(cpu=True)\n" + refuse, 1)
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29741",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (
            f"{rank}: processes 0 and 1 read different training data (5 and 5 rows; row 3 is the first to differ"
            in done.stdout
        )
        assert (
            f"{rank}: processes 0 and 1 read different training data (2 and 3 rows; row 2 is in only one of them"
            in done.stdout
        )
    assert "0: row" not in done.stdout.replace("0: row 3 of the training data", "")


VIDEO = {
    "planted_column": "planted",
    "num_frames": 4,
    "sites": ["vision.inputs"],
    "scorer": "conv",
    "budget": "0.5",
    "metrics": ["answers"],
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four frames of noise, in two of which a coloured square is; the caption names the colour."""
    path = tmp_path_factory.mktemp("videos")
    generator, rows = torch.Generator().manual_seed(0), []
    for i, (square, colour) in enumerate(squares(path, ROWS)):
        first, frames = i % 3, []
        for f in range(4):
            noise = torch.randint(0, 60, (12, 12, 3), generator=generator, dtype=torch.uint8).numpy()
            image = Pillow.open(square) if f in (first, first + 1) else Pillow.fromarray(noise)
            image.save(path / f"{i}-{f}.png")
            frames.append(f"{i}-{f}.png")
        rows.append({"frames": frames, "caption": colour, "planted": [first, first + 1]})
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def whole_frames() -> dict[str, Any]:
    """Flags of a choice among frames."""
    return {
        "hard_attention": json.dumps(
            {
                "scorer": "conv",
                "scorer_options": {"frames": 4, "whole_frames": True},
                "estimator_options": {"sample": False},
            }
        )
    }


@pytest.mark.parametrize("source", ["a folder of videos", "a data set of videos", "a data set of lists of images"])
def test_videos_of_a_folder_and_of_a_data_set(source: str, models: Path, tmp_path: Path) -> None:
    """As users have them on the Hub: the same frames as from the file, none decoded before they are asked for."""
    path = tmp_path / "data"
    path.mkdir()
    names = [f"{i}.mkv" for i in range(3)]
    for name in names:
        write_video(path / name, "ffv1", 8, "bgr0", {})
    frames = read_frames(names[0], path, 4)
    if source == "a folder of videos":
        (path / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{name},red\n" for name in names))
        flags = {"train_dir": str(path), "validation_dir": str(path)}
    else:
        if source == "a data set of videos":
            column = {"video": [{"path": None, "bytes": (path / name).read_bytes()} for name in names]}
            features = Features({"video": Video(), "caption": Value("string")})
        else:
            column, features = {"frames": [frames] * 3}, Features({"frames": List(Image()), "caption": Value("string")})
        (tmp_path / "hub").mkdir()
        Dataset.from_dict({**column, "caption": ["red"] * 3}, features).to_parquet(tmp_path / "hub" / "train.parquet")
        flags = {"dataset_name": str(tmp_path / "hub"), "validation_split": "train"}
    task = make(
        "video_captioning",
        models,
        tmp_path,
        **{**VIDEO, **flags, "planted_column": None},
        train_file=None,
        validation_file=None,
    )
    wanted = task.processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(
        task.collate([task.train[i] for i in range(3)])["pixel_values"], wanted.expand(3, -1, -1, -1, -1)
    )


@pytest.mark.parametrize("name", ["video_captioning", "video_text_retrieval"])
def test_video_task_learns_which_frames(name: str, models: Path, videos: Path) -> None:
    flags = {key: value for key, value in VIDEO.items() if key != "metrics" or name == "video_captioning"}
    task = make(name, models, videos, **{**flags, "scorer": None}, **whole_frames())
    assert hf_hardattn.selectors(task.model)["vision.inputs"].scorer.whole_frames
    loader = DataLoader(task.train, batch_size=ROWS, collate_fn=task.collate)
    model, optimizer = task.model.train(), torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40 if name == "video_captioning" else 2):
        for batch in loader:
            assert batch["pixel_values"].shape == (ROWS, 4, 3, 12, 12)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert name == "video_text_retrieval" or losses[-1] < 0.8 * losses[0]
    accelerator = Accelerator(cpu=True)
    found = compare(accelerator, model, accelerator.prepare(loader), task.predict, task.score)
    assert found["hard"]["kept_ratio"]["vision.inputs"] == 0.5  # 18 of 36 patches; CLS is no choice
    assert found["soft"]["frame_recall"] == 1.0 and found["soft"]["frame_precision"] == 0.5
    assert (
        found["hard"]["frame_recall"] == found["hard"]["frame_precision"]
    )  # two whole frames of four, two of them planted


def test_dropped_frames_are_never_computed_on(models: Path, videos: Path) -> None:
    """The choice of frames reads the patch embedding alone; after it, other pixels in dropped frames change nothing at all."""
    task = make("video_captioning", models, videos, **{**VIDEO, "scorer": None}, **whole_frames())
    model = task.model.eval()
    with torch.no_grad():
        for p in hf_hardattn.selectors(model)["vision.inputs"].parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    batch = task.collate([task.train[i] for i in range(ROWS)])
    rows: list[int] = []
    model.vision_model.encoder.layers[0].self_attn.register_forward_hook(
        lambda m, args, kwargs, out: rows.append((args or list(kwargs.values()))[0].shape[1]), with_kwargs=True
    )
    before = model(**batch).logits
    assert rows == [1 + 2 * 9]
    chosen = task.predict.__self__.chosen(model, batch["pixel_values"])
    assert all(len(frames) == 2 for frames in chosen)
    other = batch["pixel_values"].clone()
    for row, frames in enumerate(chosen):
        for frame in set(range(4)) - set(frames):
            other[row, frame] += 1e-3 * torch.randn(other[row, frame].shape)
    assert task.predict.__self__.chosen(model, other) == chosen
    assert torch.equal(model(**{**batch, "pixel_values": other}).logits, before)


def test_image_in_a_video_model_is_the_stock_image(models: Path, data: Path, videos: Path) -> None:
    """The video class is the stock one on images, and a video of equal frames holds the image's patches in each."""
    still = make("captioning", models, data)
    moving = make("video_captioning", models, videos, planted_column=None, num_frames=4)
    moving.model.load_state_dict(still.model.state_dict())
    batch = still.collate([still.train[i] for i in range(ROWS)])
    torch.testing.assert_close(moving.model.eval()(**batch).logits, still.model.eval()(**batch).logits)
    pixels = batch["pixel_values"]
    patches = moving.model.vision_model.embeddings(pixels)
    frames = moving.model.vision_model.embeddings(pixels[:, None].expand(-1, 4, -1, -1, -1))
    torch.testing.assert_close(frames, torch.cat([patches[:, :1], *[patches[:, 1:]] * 4], 1))
    with pytest.raises(
        hf_hardattn.HardAttentionError, match="--vision_features stores the tower's outputs for single images"
    ):
        make("video_captioning", models, videos, planted_column=None, vision_features="x")
    with pytest.raises(
        hf_hardattn.HardAttentionError,
        match="got 36 patches for scorer_options {'frames': 2}; it needs a grid for each frame.* set frames",
    ):
        wrong = make("video_captioning", models, videos, num_frames=4, sites=["vision.inputs"], scorer="mlp")
        hf_hardattn.apply(wrong.model, {"sites": ["vision.inputs"], "scorer": "conv", "scorer_options": {"frames": 2}})
        wrong.model(**wrong.collate([wrong.train[0]]))


@pytest.mark.parametrize("name", ["translation", "captioning"])
def test_stream_gives_the_rows_of_the_file(name: str, models: Path, data: Path) -> None:
    """A streamed file brings the same rows as a loaded one, drawn anew each epoch, and is never read ahead."""
    loaded = make(name, models, data)
    streamed = make(name, models, data, streaming=True, shuffle_buffer=3)
    assert len(streamed.validation) == ROWS and not hasattr(streamed.train, "__len__")
    keys = {"input_ids"} if name == "translation" else {"input_ids", "pixel_values"}

    def batches(task: Task) -> dict[str, list[torch.Tensor]]:
        made = [task.collate([row]) for row in task.train]
        return {key: sorted((batch[key] for batch in made), key=lambda x: str(x.tolist())) for key in keys}

    for key, rows in batches(loaded).items():
        torch.testing.assert_close(batches(streamed)[key], rows)
    with pytest.raises(hf_hardattn.HardAttentionError, match="validation_fraction=0.5 of a stream cannot be held out"):
        make(name, models, data, streaming=True, validation_fraction=0.5)


@pytest.mark.parametrize(
    ("name", "site", "picture"),
    [
        ("captioning", "text.cross.*", "step_00000003.png"),
        ("summarisation", "encoder.tokens.0", "step_00000003.html"),
        ("summarisation", "decoder.cross.*", None),
    ],
)
def test_picture_of_validation_examples(
    name: str, site: str, picture: str | None, models: Path, data: Path, tmp_path: Path
) -> None:
    """Patches that a caption reads, and a text's kept tokens, marked in what the tokenizer makes of it; choices of each query: none."""
    from hf_hardattn.training.pictures import draw

    scorer = "attention" if site.startswith("decoder") else "linear"
    task = make(name, models, data, sites=[site], scorer=scorer, budget="0.5", num_validation_examples=2)
    draw(Accelerator(cpu=True), task.model, task, task.collate.__self__.args.__class__(
        output_dir=str(tmp_path), num_validation_examples=2
    ), 3)  # fmt: skip
    made = [path.name for path in (tmp_path / "validation").iterdir()]
    assert made == ([] if picture is None else [picture])
    if picture == "step_00000003.html":
        text = (tmp_path / "validation" / picture).read_text()
        assert (
            text.count('class="hfha"') == 2
            and "<mark>" in text
            and "<s>" in text
            and "encoder.tokens.0, step 3" in text
        )
