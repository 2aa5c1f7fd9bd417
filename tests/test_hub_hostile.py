"""Somebody else's broken or hostile model: a clear refusal, nothing executed, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hub_server.models import answer, harden, same, stock, with_adapter
from safetensors.torch import load_file, save_file

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.hub.secrets import redact
from hf_hardattn.hub.untrusted import check_name
from hf_hardattn.training.arguments import ScriptArguments


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    stock().save_pretrained(root / "base")
    hard = harden(stock())
    hf_hardattn.save(hard, root / "full")
    hf_hardattn.save(hard, root / "sharded", max_shard_size="20KB")
    hf_hardattn.save(hard, root / "selectors", selectors_only=True, base_model=str(root / "base"))
    hf_hardattn.save(with_adapter(harden(stock())), root / "peft", base_model=str(root / "base"))
    return root


@pytest.fixture
def copy(saved, tmp_path):
    def make(form):
        return Path(shutil.copytree(saved / form, tmp_path / form))

    return make


def edit(path, **changes):
    data = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = data
        for key in outer:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    path.write_text(json.dumps(data))


def retensor(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("form", ["full", "sharded", "selectors", "peft"])
def test_every_form_loads_unharmed(saved, form):
    model = hf_hardattn.load(saved / form)
    assert set(hf_hardattn.selectors(model)) == {"vision.inputs", "vision.tokens.1"} and not model.training
    if form != "peft":
        assert same(answer(model), answer(harden(stock())))
    assert hf_hardattn.load(saved / form, budget=2).config.hard_attention["budget"] == {"count": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hard_attention__estimator": "evil"}, "unknown estimator 'evil'"),
        ({"hard_attention__scorer": "__init__"}, "unknown scorer '__init__'"),
        ({"hard_attention__scorer": ["linear"]}, "scorer=.* is not a name"),
        ({"hard_attention__budget": 10**30}, "budget=1000000000000000000.* is out of range"),
        ({"hard_attention__budget": -1}, "out of range"),
        ({"hard_attention__budget": 1e300}, "out of range"),
        ({"hard_attention__budget": {"start": "a", "end": [], "steps": 3}}, "start='a' of a schedule"),
        ({"hard_attention__temperature": "hot"}, "is not a schedule"),
        ({"hard_attention__sites": {"vision.tokens.99": {}}}, "no site matches"),
        ({"hard_attention__sites": {"vision.inputs": [1]}}, "is not a configuration|vision.inputs"),
        ({"hard_attention__scorer_options": {"hidden": "x" * 1000}}, "at most 500 are allowed"),
        ({"hard_attention__surprise": 1}, "unknown key of hard_attention"),
        ({"hard_attention__schema_version": 99}, "is newer"),
        ({"hard_attention": "yes"}, "must be an object"),
        ({"hard_attention": ...}, "it is a soft model"),
        ({"num_hidden_layers": 10**6}, "too few for so many layers"),
        ({"hidden_size": 10**12}, "so the two do not match"),
        ({"hidden_size": 100_000}, "cannot be loaded|do not match"),
        ({"num_labels": 10**9, "id2label": ..., "label2id": ...}, "num_labels=1000000000"),
        ({"hidden_act": "os.system"}, "cannot be loaded as ViTForImageClassification"),
        ({"architectures": ["GPT2LMHeadModel"]}, "names the class 'GPT2LMHeadModel'"),
        ({"architectures": ["pipeline"]}, "names the class 'pipeline'"),
        ({"architectures": ["onnx"]}, "names the class 'onnx'"),
        ({"architectures": ["modeling_vit"]}, "names the class 'modeling_vit'"),
        (
            {"transformers_weights": "../other/model.safetensors"},
            "sets 'transformers_weights'; that would load other code",
        ),
        ({"architectures": []}, "names the class 'None'"),
        ({"model_type": "t5"}, "says model_type='t5'"),
        ({"attn_implementation": "evil/kernel"}, "would load other code"),
        ({"quantization_config": {"quant_method": "evil"}}, "would load other code"),
        ({"image_size": -4}, "cannot be loaded"),
        ({"patch_size": 0}, "cannot be loaded"),
        ({"hidden_size": 25}, "cannot be loaded"),
        ({"hidden_size": "big"}, "cannot be loaded"),
    ],
    ids=lambda value: next(iter(value.items())).__repr__()[:50] if isinstance(value, dict) else "",
)
def test_configurations(copy, changes, message):
    folder = copy("full")
    edit(folder / "config.json", **changes)
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.load(folder)


def test_weights_that_do_not_fit(copy):
    def without_selectors(tensors):
        for name in [name for name in tensors if "selector" in name]:
            del tensors[name]

    def one_more(tensors):
        tensors["vit.evil"] = torch.zeros(3)

    def another_shape(tensors):
        tensors["classifier.weight"] = tensors["classifier.weight"][:, :-1].contiguous()

    for change, message in (
        (without_selectors, "lack 4 tensors .first: '.*selector"),
        (one_more, "have no place in the model .first: 'vit.evil'"),
        (another_shape, "cannot be loaded|have another shape"),
    ):
        folder = copy("full")
        retensor(folder / "model.safetensors", change)
        with pytest.raises(HardAttentionError, match=message):
            hf_hardattn.load(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000, -1])
def test_a_file_cut_short(copy, size):
    for form, name in (
        ("full", "model.safetensors"),
        ("selectors", "selectors.safetensors"),
        ("peft", "adapter_model.safetensors"),
    ):
        folder = copy(form)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: size if size >= 0 else len(data) + size])
        if len(data) > size:
            with pytest.raises(HardAttentionError, match="is not a complete safetensors file.*truncated or damaged"):
                hf_hardattn.load(folder)
        shutil.rmtree(folder)


def test_a_huge_header(copy):
    folder = copy("full")
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(HardAttentionError, match="not a complete safetensors file"):
        hf_hardattn.load(folder)


@pytest.mark.parametrize(
    "name", ["../full/model.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", "sub/x.safetensors"]
)
def test_an_index_that_points_elsewhere(copy, name):
    folder = copy("sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HardAttentionError, match="is not a valid file name|a shard must be a .safetensors file"):
        hf_hardattn.load(folder)


def test_shards_and_index_disagree(copy):
    folder = copy("sharded")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(HardAttentionError, match="is not a complete safetensors file"):
        hf_hardattn.load(folder)
    folder = Path(shutil.copytree(copy("full"), folder.parent / "more"))
    shutil.rmtree(folder)
    folder = folder.parent / "sharded"
    edit(folder / "model.safetensors.index.json", weight_map={"a": "model-00001-of-00003.safetensors"})
    with pytest.raises(HardAttentionError, match="disagree on|not a complete safetensors"):
        hf_hardattn.load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', "\x00", '{"a": ' * 60 + "1" + "}" * 60],
)
def test_json_that_is_none(copy, text):
    for form, name in (("full", "config.json"), ("selectors", "hard_attention.json"), ("peft", "adapter_config.json")):
        folder = copy(form)
        (folder / name).write_text(text)
        with pytest.raises(HardAttentionError):
            hf_hardattn.load(folder)
        shutil.rmtree(folder)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(copy, tmp_path):
    mark = tmp_path / "executed"
    for name in ("model.safetensors", "model.safetensors.index.json"):
        folder = copy("full")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
        (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")
        edit(folder / "config.json", auto_map={"AutoModel": "modeling_evil.X", "AutoConfig": "modeling_evil.X"})
        with pytest.raises(
            HardAttentionError, match="only 'pytorch_model.bin', a pickle or similar file that can run code"
        ):
            hf_hardattn.load(folder)
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))
        with pytest.raises(HardAttentionError):
            hf_hardattn.load(folder)
        shutil.rmtree(folder)
    for name in ("trust_remote_code", "use_safetensors", "weights_only", "state_dict"):
        with pytest.raises(HardAttentionError, match=f"load.. does not accept {name}"):
            hf_hardattn.load(tmp_path, **{name: True})
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "has format 3"),
        *(({"format": odd}, "it must be a whole number from 1 to 2") for odd in ("1", None, True, 1.0, 0, -1, [1])),
        ({"base_sha256": ...}, "key 'base_sha256' is missing or unknown"),
        ({"extra": 1}, "key 'extra' is missing or unknown"),
        ({"base_model": 7}, "base_model='7' is not a valid name"),
        ({"base_model": "/nowhere/at/all"}, "neither a folder nor the name of a repository"),
        ({"base_revision": 7}, "is not a valid revision"),
        ({"model_class": "ViTModel"}, "have no place in the model|lacks"),
        ({"model_class": "Trainer"}, "names the class 'Trainer'"),
        ({"model_class": "PreTrainedModel"}, "names the class 'PreTrainedModel'"),
        ({"hard_attention__sites": {"vision.tokens.0": {}}}, "disagree on"),
        ({"hard_attention__scorer": "mlp"}, "disagree on"),
        ({"base_sha256": "0"}, "are not those that the selectors of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_selector_files(copy, changes, message):
    folder = copy("selectors")
    edit(folder / "hard_attention.json", **changes)
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.load(folder)


def test_selector_tensors(copy):
    def first(tensors, value):
        tensors[next(iter(tensors))] = value

    for value, message in ((torch.zeros(99), "has shape .99,."), (None, "holds values that are not finite")):
        folder = copy("selectors")
        name = folder / "selectors.safetensors"
        if value is None:
            retensor(name, lambda tensors: first(tensors, next(iter(tensors.values())) / 0))
        else:
            retensor(name, lambda tensors, value=value: first(tensors, value))
        with pytest.raises(HardAttentionError, match=message):
            hf_hardattn.load(folder)
        shutil.rmtree(folder)


def test_a_base_that_moved_is_refused(copy, tmp_path):
    base = tmp_path / "moved"
    stock(seed=3).save_pretrained(base)
    folder = copy("selectors")
    edit(folder / "hard_attention.json", base_model=str(base))
    with pytest.raises(HardAttentionError, match="are not those that the selectors of .* were trained on"):
        hf_hardattn.load(folder)
    assert hf_hardattn.selectors(hf_hardattn.load(folder, verify_base=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megatron_config": {"a": 1}}, "sets 'megatron_config', which is refused"),
        ({"layer_replication": [[0, 10**6]]}, "sets 'layer_replication'"),
        ({"r": 10**9}, "has rank"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has rank"),
        ({"target_modules": "(a+)+$"}, "is not a plain name or pattern"),
        ({"target_modules": ["nothing"]}, "does not fit its base"),
        ({"target_modules": ".*.*.*.*.*.*x"}, "is not a plain name or pattern"),
        ({"target_modules": "a?a?a?a?a?a?aaaaaa"}, "is not a plain name or pattern"),
        ({"alpha_pattern": {"(a|b)+c": 2}}, "is not a plain name; it is refused"),
        ({"peft_type": "EVIL"}, "has peft_type='EVIL'; load.. supports LORA"),
        (
            {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
            "has peft_type='PROMPT_TUNING'",
        ),
        ({"peft_type": ["LORA"]}, "has peft_type="),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "../../somewhere/else/x"}, "neither a folder nor the name"),
        ({"modules_to_save": None}, "disagree on|neither the base"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters(copy, changes, message):
    folder = copy("peft")
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.load(folder)


def test_pefts_own_save_pretrained(saved, tmp_path):
    """What PEFT's own method writes, under any name of the adapter, reloads hard."""
    from peft import LoraConfig
    from transformers import ViTForImageClassification

    model = with_adapter(harden(ViTForImageClassification.from_pretrained(saved / "base")))
    model.save_pretrained(tmp_path / "plain")
    assert same(answer(hf_hardattn.load(tmp_path / "plain")), answer(model))
    model.add_adapter(
        "second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["selector", "input_selector"])
    )
    model.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "second" / "config.json").is_file()
    model.save_pretrained(tmp_path / "other", True, ["default"], is_main_process=False)
    assert not (tmp_path / "other" / "config.json").exists()
    model.set_adapter("second")
    assert same(answer(hf_hardattn.load(hf_hardattn.save(model, tmp_path / "named"))), answer(model))
    assert same(answer(hf_hardattn.load(tmp_path / "two" / "second")), answer(model))


def test_an_adapter_that_peft_alone_saved(copy):
    folder = copy("peft")
    hard = json.loads((folder / "config.json").read_text())["hard_attention"]
    (folder / "config.json").unlink()
    with pytest.raises(HardAttentionError, match="its sites are unknown.*Save with hf_hardattn.save"):
        hf_hardattn.load(folder)
    assert hf_hardattn.selectors(hf_hardattn.load(folder, hard_attention=hard))


def test_saving_says_what_is_missing(tmp_path):
    with pytest.raises(HardAttentionError, match="has no hard-attention sites; save.. is for hard models"):
        hf_hardattn.save(stock(), tmp_path / "x")
    model = harden(stock())
    with pytest.raises(HardAttentionError, match="has no base model; loading the selectors"):
        hf_hardattn.save(model, tmp_path / "x", selectors_only=True)
    with pytest.raises(HardAttentionError, match="names no base model; loading it"):
        hf_hardattn.save(with_adapter(model), tmp_path / "x")
    from peft import LoraConfig, get_peft_model

    # one that is to be trained gains the selectors by itself
    bare = get_peft_model(harden(stock()), LoraConfig(target_modules=["q_proj"], inference_mode=True))
    with pytest.raises(HardAttentionError, match="the adapter does not save .*modules_to_save="):
        hf_hardattn.save(bare, tmp_path / "x", base_model="a/b")
    assert not (tmp_path / "x").exists()


def test_prefixes_are_stripped(tmp_path):
    model = harden(stock())
    expected = answer(model)
    for number, wrapped in enumerate((torch.compile(model), torch.nn.DataParallel(model))):
        hf_hardattn.save(wrapped, tmp_path / str(number))
        names = load_file(tmp_path / str(number) / "model.safetensors")
        assert not any("_orig_mod" in name or name.startswith("module.") for name in names)
        assert same(answer(hf_hardattn.load(tmp_path / str(number))), expected)
    model.vit.layers[0] = torch.compile(model.vit.layers[0])
    hf_hardattn.save(model, tmp_path / "layer")
    assert same(answer(hf_hardattn.load(tmp_path / "layer")), expected)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("training.pt", b"x", "training.pt is unsafe: a pickle or code runs"),
        ("modeling_x.py", b"x", "modeling_x.py is unsafe"),
        ("modeling_hf_hardattn.py", b"import os", "is not the file that hf_hardattn writes"),
        ("notes.docx", b"x", "notes.docx is not a file of a model or its card; other files are not pushed"),
        (".env", b"x", "is not a file of a model"),
        ("a b;rm.json", b"{}", "is not a file"),
        ("README.md", b"hf_" + b"q" * 34, "README.md holds an access token"),
        ("results.json", b'{"key": "ghp_' + b"q" * 36 + b'"}', "results.json holds an access token"),
    ],
)
def test_what_is_not_pushed(copy, name, data, message):
    folder = copy("full")
    (folder / name).write_bytes(data)
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.push(folder, "me/x")


def test_only_hard_models_that_others_can_load_are_pushed(copy, saved, tmp_path):
    with pytest.raises(HardAttentionError, match="others would load it soft"):
        hf_hardattn.push(saved / "base", "me/x")
    with pytest.raises(HardAttentionError, match="which exists only on this machine"):
        hf_hardattn.push(saved / "selectors", "me/x")
    with pytest.raises(HardAttentionError, match="which exists only on this machine"):
        hf_hardattn.push(saved / "peft", "me/x")
    folder = copy("full")
    edit(folder / "config.json", hard_attention__sites={"vision.tokens.0": {}})
    with pytest.raises(
        HardAttentionError, match="has 2 selector tensors according to its config.json, but 4 in its weights"
    ):
        hf_hardattn.push(folder, "me/x")
    (folder / "LICENSE").symlink_to(saved / "full" / "config.json")
    with pytest.raises(HardAttentionError, match="LICENSE is a link to a place outside"):
        hf_hardattn.push(folder, "me/x")
    for name in ("", "x", "a/b/c", "../x", "a b/c"):
        with pytest.raises(HardAttentionError, match="user/name"):
            hf_hardattn.push(folder, name)


def test_a_card_with_a_number_changed_by_hand_is_not_pushed(copy):
    folder = copy("full")
    card = next(Path(__file__).resolve().parents[1].glob("model_cards/*/README.md"))
    for name in ("README.md", "card.json"):
        shutil.copyfile(card.with_name(name), folder / name)
    (folder / "README.md").write_text(card.read_text().replace("| hard | 8", "| hard | 9"))
    with pytest.raises(HardAttentionError, match="README.md does not match card.json"):
        hf_hardattn.push(folder, "me/x")


def test_the_stub_names_the_package(tmp_path, monkeypatch):
    from hf_hardattn.hub.contents import list_files

    folder = hf_hardattn.save(harden(stock()), tmp_path / "stub", remote_code_stub=True)
    text = (folder / "modeling_hf_hardattn.py").read_text()
    assert "pip install hf-hardattn" in text
    assert "modeling_hf_hardattn.py" in list_files(folder)[0]
    assert same(answer(hf_hardattn.load(folder)), answer(harden(stock())))
    broken = text.replace("import hf_hardattn", "import hf_hardattn_that_is_not_here")
    with pytest.raises(ImportError, match="install it with: pip install hf-hardattn"):
        exec(compile(broken, "stub", "exec"), {})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    from transformers import AutoModelForImageClassification

    trusted = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert same(answer(trusted), answer(harden(stock())))
    trusted.save_pretrained(tmp_path / "again")
    assert same(answer(hf_hardattn.load(tmp_path / "again")), answer(trusted))


@pytest.mark.parametrize(
    "name", ["..", "a/..", "/a", "a//b", "a\\b", "c:x", "a\nb", "", ".", "a/./b", "con\x00", "x" * 300, "%2e%2e/a"]
)
def test_names_that_are_none(name):
    with pytest.raises(HardAttentionError, match="is not a valid file name"):
        check_name(name, "x")


def test_no_argument_holds_a_token():
    """Trackers are given all arguments of a script; none of them can be a token."""
    names = [field.name for field in fields(ScriptArguments)]
    assert "hub_model_id" in names and not any("token" in name for name in names)


def test_one_folder_holds_one_form(tmp_path):
    model = harden(stock())
    hf_hardattn.save(model, tmp_path / "x", selectors_only=True, base_model="a/b")
    with pytest.raises(
        HardAttentionError, match="holds hard_attention.json, so load.. would still read it as selectors alone"
    ):
        hf_hardattn.save(model, tmp_path / "x")
    hf_hardattn.save(model, tmp_path / "x", selectors_only=True, base_model="a/b")
    hf_hardattn.save(with_adapter(model), tmp_path / "y", base_model="a/b")
    with pytest.raises(
        HardAttentionError, match="holds adapter_config.json, so load.. would still read it as an adapter"
    ):
        hf_hardattn.save(harden(stock()), tmp_path / "y")


def test_names_that_are_no_tricks():
    for name in ("tést 模型.png", "a/b [1] (copy).json", ".gitattributes", "v1..2.md", "it's & that.txt", "a" * 200):
        assert check_name(name, "x") == name
    for name in (
        "",
        "/a",
        "a//b",
        "..",
        "a/..",
        "./a",
        "a\\b",
        "C:x",
        "a\x00",
        "a\n",
        "a\u202eb",
        "a\u200b",
        "a ",
        "a.",
        "nul*",
        "x" * 1001,
    ):
        with pytest.raises(HardAttentionError, match="is not a valid file name in x"):
            check_name(name, "x")


def test_a_token_that_looks_like_nothing(copy):
    """One that is passed by hand is known although it has no token's form."""
    folder, token = copy("full"), "correct horse battery"
    assert token not in redact(f"no {token} here", token)
    (folder / "README.md").write_text(f"# A card\n{token}\n")
    with pytest.raises(HardAttentionError, match="README.md holds an access token"):
        hf_hardattn.push(folder, "me/x", token=token)
    for word in ("message", "branch", "tag"):
        with pytest.raises(HardAttentionError, match=f"the {word} holds an access token") as refused:
            hf_hardattn.push(folder, "me/x", token=token, **{word: f"with {token}"})
        assert token not in str(refused.value)


def test_tokens_are_blanked():
    token = "hf_" + "A" * 34
    assert token not in redact(f"Bearer {token}, and {token}.") and "hf_***" in redact(token)
    assert redact("import hf_hardattn.training.cluttered_digits") == "import hf_hardattn.training.cluttered_digits"
