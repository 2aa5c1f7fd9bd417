"""The toys with exact gradients: their truths, the published numbers, and the command that makes the table."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from hf_hardattn import registry
from hf_hardattn.distributions import ConditionalBernoulli
from hf_hardattn.training import estimator_toys as toys
from hf_hardattn.training.estimator_toys import ORDERS, SEEDS, Variant

SETS = "conditional_bernoulli"


@pytest.mark.parametrize("seed", SEEDS)
def test_simple_toy_has_the_published_values(seed: int) -> None:
    scores, losses = toys.simple_toy(seed)
    mean, gradient = toys.truth(scores, 5, SETS, losses["quadratic"])
    least = losses["quadratic"](toys.subsets(10, 5)).min()
    assert (mean.item(), least.item(), gradient.norm().item()) == pytest.approx(SEEDS[seed], abs=1e-6)


def test_simple_toy_with_one_position() -> None:
    scores, losses = toys.simple_toy(1234)
    assert toys.truth(scores, 1, SETS, losses["quadratic"])[0].item() == pytest.approx(11.286426, abs=1e-6)
    assert losses["quadratic"](toys.subsets(10, 1)).min().item() == pytest.approx(8.756282, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_probabilities_are_those_of_the_laws(k: int) -> None:
    """Sets by the library's law, orders by the loop of the definition; rows at once as one by one."""
    scores = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    masks, p = toys.subsets(5, k), toys.probabilities(scores, k, SETS)
    law = ConditionalBernoulli(scores[0].expand(len(masks), 5), torch.tensor(k), torch.ones(5, dtype=torch.bool), k)
    torch.testing.assert_close(law.log_prob(masks.bool()).exp(), p[0], atol=1e-6, rtol=1e-5)
    wanted = torch.zeros(len(masks), dtype=torch.float64)
    for pick, row in zip(*toys.orders(5, k), strict=True):
        left, probability = list(range(5)), 1.0
        for i in pick.tolist():
            probability *= (scores[1, i].exp() / scores[1, left].exp().sum()).item()
            left.remove(i)
        wanted[row] += probability
    torch.testing.assert_close(toys.probabilities(scores, k, ORDERS)[1], wanted)
    torch.testing.assert_close(toys.probabilities(scores[1], k, ORDERS), wanted)


def test_gumbel_top_k_is_not_the_law_of_sets() -> None:
    """Total variation between the two laws on the ten seeds, k = 5: mean 0.141, largest 0.202."""
    distances = []
    for seed in SEEDS:
        scores, _ = toys.simple_toy(seed)
        distances.append(
            (toys.probabilities(scores, 5, SETS) - toys.probabilities(scores, 5, ORDERS)).abs().sum().item() / 2
        )
    assert sum(distances) / 10 == pytest.approx(0.141, abs=1e-3) and max(distances) == pytest.approx(0.202, abs=1e-3)


def test_every_registered_estimator_has_a_row_or_a_reason() -> None:
    covered = {variant.name for variant in toys.all_variants()} | set(toys.LEFT_OUT)
    assert covered == set(registry.names("estimators"))
    labels = [variant.label for variant in toys.all_variants()]
    assert len(set(labels)) == len(labels)


def test_swapped_attention_has_the_value_of_attention_and_bounded_derivatives() -> None:
    """At k = 1 the derivative of a dropped gate is what its choice would make of the output, to first order in the loss."""
    scores, losses = toys.simple_toy(1234)
    for k in (1, 5):
        masks = toys.subsets(10, k)
        torch.testing.assert_close(losses["attention"](masks), losses["attention, swapped"](masks))
        torch.testing.assert_close(losses["attention"](masks + 0.3), losses["attention, swapped"](masks + 0.3))
    truths = [toys.truth(scores, 1, SETS, losses[name])[1] for name in ("attention", "attention, swapped")]
    torch.testing.assert_close(*truths)
    torch.manual_seed(0)
    found = toys.through_gates(Variant("", "reinmax"), scores, 1, losses, 10_000)
    # quadratic in the output, and the output linear in which one is chosen: exact for ReinMax
    assert toys.columns(found["attention, swapped"], truths[0])["z"] < 4.5
    assert toys.columns(found["attention"], truths[0])["z"] > 30


def test_columns() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = toys.columns(torch.tensor([[6.0, 8.0], [0.0, 0.0]], dtype=torch.float64), exact)
    assert found["bias"] == pytest.approx(0) and found["error"] == pytest.approx(0.5)
    assert found["sd"] == pytest.approx(1) and found["size"] == pytest.approx(1) and found["z"] == pytest.approx(0)
    assert toys.columns(torch.zeros(3, 2, dtype=torch.float64), exact)["bias"] is None
    assert toys.columns(-exact.expand(3, 2), exact)["size"] == pytest.approx(-1)


def test_measure() -> None:
    """2 000 draws of a small toy: unbiased rows within 4.5 standard errors under the law they draw from, ReinMax too where the
    loss is quadratic; four samples are less noisy than two."""
    torch.manual_seed(0)
    scores, losses = toys.simple_toy(1234, n=5)
    found = toys.measure(scores, 2, losses, 2_000)
    assert set(found) == set(toys.LOSSES)
    assert all(label in found["tanh"] for label in toys.CRUDE)
    for loss, rows in found.items():
        for variant in toys.all_variants():
            if not registry.load("estimators", variant.name).biased or (variant.name, loss) == ("reinmax", "quadratic"):
                assert rows[variant.label]["z"] < 4.5, (loss, variant.label)
        assert rows["sfess, K 8"]["sd"] < rows["sfess, K 4"]["sd"] < rows["sfess, K 2"]["sd"]
        assert rows["reinforce, exact mean"]["sd"] < rows["reinforce, no baseline"]["sd"]
        assert rows["gumbel_rao, 10 draws, T 1"]["sd"] < rows["gumbel, T 1"]["sd"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "k", "bias", "error", "sd"),
    [("simple", 1, 0.0105, 0.211, 0.79), ("simple", 5, 0.0370, 0.246, 0.84), ("reinmax", 1, 0.0003, 0.623, 2.75)],
)
def test_measured_as_before(name: str, k: int, bias: float, error: float, sd: float) -> None:
    """Means over the ten seeds, against numbers that other code measured."""
    torch.manual_seed(0)
    found = []
    for seed in SEEDS:
        scores, losses = toys.simple_toy(seed)
        only = {"quadratic": losses["quadratic"]}
        gradients = toys.through_gates(Variant(name, name), scores, k, only, 10_000)["quadratic"]
        found.append(toys.columns(gradients, toys.truth(scores, k, SETS, losses["quadratic"])[1]))
    means = [sum(row[column] for row in found) / 10 for column in ("bias", "error", "sd")]
    assert means == pytest.approx([bias, error, sd], abs=0.02, rel=0.02) and abs(means[0] - bias) < 0.002


@pytest.mark.parametrize(
    ("p", "gradient", "ends"),
    [
        ([0.45], 0.025, (0.3025, 0.2025)),
        ([0.49], 0.005, (0.2601, 0.2401)),
        ([0.499], 0.0005, (0.251001, 0.249001)),
        ([0.6, 0.51, 0.48], -0.045, (0.6705, 0.8505)),
    ],
)
def test_bernoulli_toys_have_the_published_values(p: list[float], gradient: float, ends: tuple[float, float]) -> None:
    """REBAR's and Kool's: the losses at b = 1 and 0, and the gradient at phi = 0."""
    scores, loss = toys.bernoulli_toy(p)
    assert loss(toys.subsets(2, 1)).tolist() == pytest.approx(ends)
    mean, found = toys.truth(scores, 1, SETS, loss)
    assert mean.item() == pytest.approx(sum(ends) / 2) and found.tolist() == pytest.approx([gradient, -gradient])


def test_imle_toy_starts_and_ends_where_it_should() -> None:
    """From 5.239365; the optimum is 1.125151. In 50 steps I-MLE with the published lambda and learning rate comes within 0.5."""
    scores, losses = toys.simple_toy(0)
    loss = losses["quadratic"]
    assert toys.expected(scores, 5, SETS, loss).item() == pytest.approx(5.239365, abs=1e-6)
    assert loss(toys.subsets(10, 5)).min().item() == pytest.approx(1.125151, abs=1e-6)
    torch.manual_seed(0)
    for variant, rate in (
        (Variant("", "imle", {"strength": 2.0, "adaptive": False}, law=ORDERS), 0.75),
        (Variant("", "sfess", samples=4, baseline="others"), 0.3),
    ):
        assert 1.125151 < toys.optimise(variant, scores, 5, loss, rate, 50, 0.9) < 1.625


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts" / "research"))
    command = importlib.import_module("estimator_table")
    few = tuple(v for v in toys.VARIANTS if v.label in ("simple", "reinmax", "log_gate", "sfess, K 4"))
    monkeypatch.setattr(toys, "all_variants", lambda: few)
    monkeypatch.setattr(command, "all_variants", lambda: few)
    monkeypatch.setattr(command, "LIMIT", math.inf)  # of a few draws the spread is not known
    results = command.main(["--draws", "20", "--seeds", "1234", "--output", str(tmp_path / "toys" / "estimators.json")])
    saved = json.loads((tmp_path / "toys" / "estimators.json").read_text())
    assert saved["largest_z"] == results["largest_z"] and {row["k"] for row in saved["subsets"]} == {1, 5}
    text = (tmp_path / "toys" / "estimators.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert all(f"| {variant.label} |" in text for variant in few)
    assert "## k = 5, attention loss" in text and "`marginal` (is the enumeration)" in text
    monkeypatch.setattr(command, "LIMIT", 5.0)
    with pytest.raises(SystemExit, match="6.0 standard errors off; the limit is 5.0"):
        command.check({"largest_z": 6.0})
