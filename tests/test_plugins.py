"""Plug-ins: scorers, estimators and baselines of other packages, by ``register`` and by entry points."""

from __future__ import annotations

import copy
import sys
from typing import Annotated

import pytest
import torch
from hub_server.models import stock
from torch import Tensor, nn

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError, registry
from hf_hardattn.baselines import Baseline
from hf_hardattn.estimators import Choice, Estimator, Sampling
from hf_hardattn.functional.topk import topk_mask
from hf_hardattn.options import Range
from hf_hardattn.scorers import Projections, Scorer


class Scaled(Scorer):
    """Scores by one learned direction, times ``scale``."""

    def __init__(
        self, hidden_size: int, query_size: int, heads: int = 1, scale: Annotated[float, Range(0.1, 10)] = 1.0
    ):
        super().__init__(hidden_size, query_size, heads)
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(heads, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        return self.scale * (states.float() @ self.weight.float().T).transpose(1, 2).unsqueeze(-1)


class Through(Estimator):
    """Top k, with the gradient of a sigmoid."""

    biased = True
    needs = ("gates",)

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        mask, smooth = topk_mask(scores, k, valid, slots), (self.slope * scores).sigmoid()
        return Choice(mask, gates=mask + (smooth - smooth.detach()))


class Zero(Baseline):
    """No baseline."""

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        return torch.zeros_like(reward)


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    registry._entry_points.cache_clear()
    registry._load_plugin.cache_clear()
    yield
    registry._entry_points.cache_clear()
    registry._load_plugin.cache_clear()


def register_all():
    hf_hardattn.register("scorer", "scaled", Scaled)
    hf_hardattn.register("estimators", "through", Through)  # the plural is the same kind
    hf_hardattn.register("baseline", "zero", Zero)


def test_registered_scorer_and_estimator_train_a_vit():
    register_all()
    model = hf_hardattn.apply(
        stock(),
        {"sites": ["vision.tokens.0"], "scorer": "scaled", "scorer_options": {"scale": 2.0}, "estimator": "through"},
    ).train()
    (selector,) = hf_hardattn.selectors(model).values()
    assert isinstance(selector.scorer, Scaled) and selector.scorer.scale == 2.0
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    size = model.config.image_size
    pixels, labels = torch.randn(4, model.config.num_channels, size, size), torch.tensor([0, 1, 0, 1])
    for _ in range(2):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.endswith("selector.scorer.weight") for name in changed)


def test_registered_baseline_serves_reinforce():
    register_all()
    model = hf_hardattn.apply(
        stock(), {"sites": ["vision.tokens.0"], "estimator": "reinforce", "baseline": "zero"}
    ).train()
    (selector,) = hf_hardattn.selectors(model).values()
    assert isinstance(selector.baseline, Zero)


def test_saved_model_names_its_plugin(tmp_path):
    register_all()
    hf_hardattn.apply(stock(), {"sites": ["vision.tokens.0"], "scorer": "scaled"}).save_pretrained(tmp_path)
    again = type(stock()).from_pretrained(tmp_path)
    assert isinstance(next(iter(hf_hardattn.selectors(again).values())).scorer, Scaled)
    registry._registered.clear()
    with pytest.raises(HardAttentionError, match=r"unknown scorer 'scaled'.*hf_hardattn.register\('scorer'"):
        type(stock()).from_pretrained(tmp_path)


def test_registered_names_are_listed_and_checked():
    register_all()
    assert {"through", "simple"} <= set(registry.names("estimators")) and registry.load(
        "estimators", "through"
    ) is Through
    with pytest.raises(HardAttentionError, match="scale=11 is out of range at scorer scaled .*'the top level'"):
        HardAttentionConfig(scorer="scaled", scorer_options={"scale": 11})
    with pytest.raises(HardAttentionError, match="unknown option of estimator 'through': 'slop'.*Did you mean 'slope'"):
        HardAttentionConfig(estimator="through", estimator_options={"slop": 1})
    with pytest.raises(HardAttentionError, match="unknown option of scorer 'scaled': 'hidden_size'"):
        HardAttentionConfig(scorer="scaled", scorer_options={"hidden_size": 3})


def test_any_annotation_of_an_option_is_checked():
    class Loose(Through):
        def __init__(self, sizes: list[int] | None = None, table: dict = {}, anything=0, *, needed: int, **rest):  # noqa: B006
            super().__init__(**rest)

    hf_hardattn.register("estimator", "loose", Loose)
    good = {"needed": 1, "sizes": [1, 2], "table": {"a": [1.0]}, "anything": "x", "slope": 2}
    assert HardAttentionConfig(estimator="loose", estimator_options=good).estimator_options == good
    for changes, message in [
        ({"sizes": {"a": 1}}, "sizes={'a': 1} has the wrong type .*; it must be a list or None"),
        ({"table": [1]}, "table=.1. has the wrong type .*; it must be a dict"),
        ({"anything": float("nan")}, "anything=nan at .* holds a number that is not finite"),
        ({"slope": "steep"}, "slope='steep' has the wrong type .*; it must be a number"),
        ({"rest": 1}, "unknown option of estimator 'loose': 'rest'"),
    ]:
        with pytest.raises(HardAttentionError, match=message):
            HardAttentionConfig(estimator="loose", estimator_options={**good, **changes})
    with pytest.raises(HardAttentionError, match="option 'needed' is missing at estimator loose .* Set it to an int"):
        HardAttentionConfig(estimator="loose")


def test_a_name_is_taken_once():
    register_all()
    hf_hardattn.register("estimator", "through", Through)  # the same again changes nothing
    other = type("Other", (Through,), {})
    for name in ("through", "simple"):
        with pytest.raises(HardAttentionError, match=f"estimator '{name}' is already registered.*overwrite=True"):
            hf_hardattn.register("estimator", name, other)
        hf_hardattn.register("estimator", name, other, overwrite=True)
        assert registry.load("estimators", name) is other


@pytest.mark.parametrize(
    ("kind", "name", "member", "message"),
    [
        (
            "architecture",
            "mine",
            Through,
            "unknown kind of plug-in 'architecture'; known: 'baseline', 'estimator', 'scorer'",
        ),
        (["scorer"], "mine", Scaled, "unknown kind of plug-in"),
        ("estimator", "my/name", Through, "'my/name' is not a valid name for a plug-in"),
        ("estimator", 3, Through, "3 is not a valid name for a plug-in"),
        (
            "scorer",
            "mine",
            Through,
            "cannot be used as scorer 'mine'; it must be a subclass of hf_hardattn.scorers.Scorer",
        ),
        ("scorer", "mine", Scorer, "cannot be used as scorer 'mine'"),
        ("baseline", "mine", Zero(), "cannot be used as baseline 'mine'"),
        ("estimator", "mine", type("Silent", (Estimator,), {}), "does not say whether it is biased"),
        ("estimator", "mine", type("Odd", (Through,), {"needs": ("labels",)}), "needs=.'labels',. of estimator 'mine'"),
    ],
)
def test_what_register_refuses(kind, name, member, message):
    with pytest.raises(HardAttentionError, match=message):
        hf_hardattn.register(kind, name, member)
    assert not registry._registered


MODULE = """
from hf_hardattn.estimators import Estimator

class Mine(Estimator):
    biased = True

    def __init__(self, size: int = 1, **rest):
        super().__init__()
"""
POINTS = """
[hf_hardattn.plugins]
estimator.mine = plugged_in:Mine
estimator.broken = nowhere_at_all:Mine
scorer.wrong = plugged_in:Mine
estimator.simple = plugged_in:Mine
no_kind = plugged_in:Mine
"""


def test_entry_points_of_installed_packages(tmp_path, monkeypatch):
    info = tmp_path / "plugged_in-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "plugged_in.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning) as warned:
        names = registry.names("estimators")
    said = [str(warning.message) for warning in warned]
    assert {"mine", "broken"} <= set(names) and "wrong" in registry.names("scorers")
    assert any("'no_kind = plugged_in:Mine' of hf_hardattn.plugins is ignored" in text for text in said)
    assert any("estimator 'simple' is built in" in text for text in said)
    assert "plugged_in" not in sys.modules, "names are listed without an import"
    config = HardAttentionConfig(estimator="mine", estimator_options={"size": 3})
    assert registry.load("estimators", config.estimator).__name__ == "Mine" and "plugged_in" in sys.modules
    monkeypatch.delitem(sys.modules, "plugged_in")
    with pytest.raises(HardAttentionError, match="size='3' has the wrong type at estimator mine .*must be an int"):
        HardAttentionConfig(estimator="mine", estimator_options={"size": "3"})
    with pytest.raises(HardAttentionError, match="'nowhere_at_all:Mine', cannot be imported .ModuleNotFoundError"):
        HardAttentionConfig(estimator="broken")
    with pytest.raises(HardAttentionError, match="cannot be used as scorer 'wrong'"):
        HardAttentionConfig(scorer="wrong")
