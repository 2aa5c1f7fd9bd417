"""Fuzz: 10,000 configurations, files, names and records, and no crash outside the library's own error."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from hub_server.models import harden, stock
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError
from hf_hardattn.hub import source
from hf_hardattn.hub.card import render
from hf_hardattn.hub.record import read_record
from hf_hardattn.hub.references import Resolver
from hf_hardattn.hub.tensors import read_header, read_headers
from hf_hardattn.hub.untrusted import check_name, read_config, read_json

pytestmark = pytest.mark.slow
RECORD = read_record(next(Path(__file__).resolve().parents[1].glob("model_cards/*/source.json")))
CONFIG = HardAttentionConfig(
    sites={
        "vision.inputs": {"budget": 3},
        "vision.tokens.*": {"scorer": "mlp", "temperature": {"start": 1.0, "end": 0.1, "steps": 9}},
    },
    budget={"start": 1.0, "end": 0.5, "steps": 10},
    estimator="reinforce",
).to_dict()
WORDS = [
    "linear",
    "simple",
    "random",
    "vision.inputs",
    "*",
    "threshold:0.5",
    "top_p:2",
    "top_p:nan",
    "auto",
    "__class__",
    "../x",
    "",
    "\x00",
    "1",
]
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**30, 0.0, 0.5, 1.0, 1.5, 1e308, -0.0, 5e-324]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(WORDS)
    | st.sampled_from(NUMBERS)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["start", "end", "steps", "budget", "scorer", "a"]) | st.text(max_size=6), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def cases(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def paths(data, here=()):
    """Every place in JSON."""
    yield here
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths(value, (*here, key))


@st.composite
def mutated(draw, data, most=3):
    """``data`` with up to ``most`` places replaced, removed or added to."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, most))):
        *outer, last = draw(st.sampled_from([path for path in paths(data) if path] or [("a",)]))
        inner = data
        for key in outer:
            inner = inner[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                inner[last] = draw(VALUES)
            case "remove" if not isinstance(inner, list):
                inner.pop(last, None)
            case _ if isinstance(inner, dict):
                inner[draw(st.text(max_size=8))] = draw(VALUES)
    return data


def refused_or(call):
    """Run ``call``; the library's own error is the only one allowed."""
    try:
        return call()
    except HardAttentionError as error:
        assert len(str(error)) < 3000
        return None


@cases(4500)
@given(mutated(CONFIG), VALUES)
def test_configurations(data, budget):
    config = refused_or(lambda: read_config(data, "somebody/model"))
    if config is not None:
        assert HardAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        refused_or(lambda: config.replace(budget=budget))


@cases(1500)
@given(st.text(max_size=40) | st.from_regex(r"[./\\a-z:%\x00-]{1,20}", fullmatch=True))
def test_names(name):
    accepted = refused_or(lambda: check_name(name, "somebody/model"))
    if accepted:
        place = (Path("/root/here") / accepted).resolve()
        assert place.is_relative_to("/root/here") and "\\" not in name and ":" not in name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    stock().save_pretrained(root / "base")
    model = harden(stock(), {"sites": ["vision.tokens.0"], "budget": 0.5})
    hf_hardattn.save(model, root / "full")
    hf_hardattn.save(model, root / "sharded", max_shard_size="20KB")
    hf_hardattn.save(model, root / "selectors", selectors_only=True, base_model=str(root / "base"))
    return root


@cases(1500)
@given(st.data())
def test_damaged_files(folders, data):
    path = folders / "selectors" / "selectors.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        content = content or bytearray(b"x")
    damaged = folders / "damaged.safetensors"
    damaged.write_bytes(content)
    refused_or(lambda: read_header(damaged, "somebody/model"))


@cases(1000)
@given(st.data())
def test_json_and_indices(folders, data):
    folder = folders / "index"
    if not folder.exists():
        shutil.copytree(folders / "sharded", folder)
    index = json.loads((folders / "sharded" / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict(list(index["weight_map"].items())[:4])
    text = json.dumps(data.draw(mutated(index)))
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + data.draw(st.text(max_size=3))
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    refused_or(lambda: read_json(folder / "model.safetensors.index.json", "somebody/model"))
    refused_or(lambda: read_headers(folder, "somebody/model"))


@cases(1200)
@given(mutated(RECORD))
def test_card_records(data):
    card = refused_or(lambda: render(data))
    assert card is None or str(card).startswith("---\n")
    refused_or(lambda: Resolver(Path("/nowhere")).resolve(data))


@pytest.fixture(autouse=True, scope="module")
def offline():
    """A mutated base model may be a name that the Hub knows: nothing here asks it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


def test_a_base_that_nobody_can_fetch(tmp_path, monkeypatch):
    with pytest.raises(HardAttentionError, match="me/model is not in the cache, and nothing is downloaded offline"):
        hf_hardattn.load("me/model", cache_dir=tmp_path)

    def unreachable(self, *args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(source.HfApi, "model_info", unreachable)
    with pytest.raises(HardAttentionError, match="me/model cannot be fetched .*not known.*the Hub did not answer"):
        hf_hardattn.load("me/model", cache_dir=tmp_path)


@cases(300)
@given(st.data())
def test_whole_repositories(folders, data):
    form, name = data.draw(st.sampled_from([("full", "config.json"), ("selectors", "hard_attention.json")]))
    folder = folders / f"whole-{form}"
    if not folder.exists():
        shutil.copytree(folders / form, folder)
    changed = data.draw(mutated(json.loads((folders / form / name).read_text())))
    (folder / name).write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
    model = refused_or(lambda: hf_hardattn.load(folder))
    assert model is None or hf_hardattn.selectors(model)
