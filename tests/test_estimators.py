"""Estimators: one contract for all of them, and their mean gradients against exact enumeration."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from hf_hardattn import registry
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.estimators import NEEDS, Base, Choice, Sampling
from hf_hardattn.laws import ConditionalBernoulli, PlackettLuce
from hf_hardattn.selection import topk_mask
from hf_hardattn.training.estimator_toys import SEEDS

NAMES = registry.names("estimators")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "straight_through": [{"surrogate": "sigmoid"}, {"surrogate": "softmax"}, {"surrogate": "identity"}],
    "gumbel": [{"hard": True}, {"hard": False}],
    "simple": [{"sample": True}, {"sample": False}],
    "reinforce": [{"law": "plackett_luce"}, {"law": "conditional_bernoulli"}],
    "perturbed": [{"hard": True}, {"hard": False}],
    "imle": [
        {"adaptive": adaptive, "noise": noise} for adaptive in (True, False) for noise in ("gumbel", "sum_of_gamma")
    ],
    "entmax": [{"hard": True}, {"hard": False}],
    "sparsemax": [{"hard": True}, {"hard": False}],
    "log_gate": [{"hard": True}, {"hard": False}],
}
VARIANTS = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name in NAMES
    for options in OPTIONS.get(name, [{}])
]


def those(wanted: Callable[[type[Base], dict[str, Any]], bool]) -> list[Any]:
    """The variants of which something is true."""
    return [v for v in VARIANTS if wanted(registry.load("estimators", v.values[0]), v.values[1])]


EXACT = those(lambda estimator, _: estimator.exact_budget)
GATED = those(lambda estimator, _: "gates" in estimator.needs and estimator.source != "the model's own attention")
HARD = those(
    lambda estimator, options: "gates" in estimator.needs and estimator.exact_budget and options.get("hard", True)
)
SCORED = those(lambda estimator, _: "reward" in estimator.needs)
LEARNING = GATED + SCORED


def variants(*names: str) -> list[Any]:
    return [v for v in VARIANTS if v.values[0] in names]


def build(name: str, options: dict[str, Any] | None = None) -> Base:
    return registry.load("estimators", name)(**(options or {}))


def choose(
    estimator: str | Base,
    options: dict[str, Any],
    scores: Tensor,
    k: Tensor | int,
    valid: Tensor | None = None,
    training: bool = True,
    temperature: float = 1.0,
    **sampling: Any,
) -> Choice:
    k = torch.as_tensor(k)
    valid = torch.ones(scores.shape, dtype=torch.bool) if valid is None else valid.expand_as(scores)
    estimator = build(estimator, options) if isinstance(estimator, str) else estimator
    how = Sampling(uniform=torch.rand, temperature=temperature, **sampling) if training else None
    return estimator.choose(scores, k.expand(scores.shape[:-1]), valid, slots=max(1, int(k.max())), sampling=how)


def carrier(choice: Choice) -> Any:
    """What the gradient flows through."""
    return choice.log_prob if choice.gates is None else choice.gates


def mixed_rows(scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[2, 3, 4, 9]`` with their own k and padding; k = 0, k > valid and all-padding rows among them."""
    torch.manual_seed(5)
    scores = scale * torch.randn(2, 3, 4, 9)
    k = torch.randint(0, 8, (2, 3, 4))
    valid = torch.rand(2, 3, 4, 9) < 0.7
    valid[0, 0], valid[0, 1] = False, True
    return scores, k, valid


@pytest.mark.parametrize("name", NAMES)
def test_declares_its_facts(name: str) -> None:
    estimator = registry.load("estimators", name)
    assert isinstance(estimator.biased, bool) and estimator.source and set(estimator.needs) <= set(NEEDS)
    assert estimator.trains_gathered is ("gates" not in estimator.needs)
    assert "Source:" in estimator.__doc__


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("scale", [4.0, 1e4])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_keeps_the_contract(name: str, options: dict[str, Any], scale: float, temperature: float) -> None:
    """Exactly the budget, ones and zeros, finite values and gradients, none where there is no choice: also at huge scores."""
    estimator = build(name, options)
    scores, k, valid = mixed_rows(scale)
    scores.requires_grad_()
    choice = choose(estimator, options, scores, k, valid, temperature=temperature)
    assert choice.mask.dtype == torch.bool and choice.mask.shape == scores.shape
    assert not (choice.mask & ~valid).any()
    # no choice, no gradient: not even rounding noise
    fixed = (k == 0) | (k >= valid.sum(-1))
    if name != "soft":
        exact = torch.equal(choice.mask.sum(-1), torch.minimum(k, valid.sum(-1)))
        assert exact or not estimator.exact_budget
        assert torch.equal(choice.mask[fixed].sum(-1), torch.minimum(k, valid.sum(-1))[fixed])
    loss = scores.new_zeros(())
    for value in (choice.gates, choice.log_prob, choice.entropy, choice.penalty):
        if value is not None:
            assert value.dtype == torch.float32 and value.isfinite().all()
            loss = loss + (value * torch.rand(value.shape)).sum()
    if loss.requires_grad:
        gradient = torch.autograd.grad(loss, scores)[0]
        assert gradient.isfinite().all() and (gradient[~valid] == 0).all()
        assert fixed.any() and (gradient[fixed] == 0).all()
    if choice.gates is not None and name != "soft":
        hard = choice.mask if options.get("hard", estimator.exact_budget) else choice.mask & fixed.unsqueeze(-1)
        assert torch.equal(choice.gates[hard], torch.ones_like(choice.gates[hard]))
        assert (choice.gates[~valid] == 0).all() and (choice.gates >= 0).all()
        if estimator.exact_budget:
            torch.testing.assert_close(choice.gates.sum(-1), choice.mask.sum(-1).float())
        else:
            assert torch.equal(choice.gates > 0, choice.mask)
    for value in (choice.log_prob, choice.entropy, choice.penalty):
        assert value is None or (value[fixed] == 0).all()


# the gradient of these is 0 beyond the border between kept and dropped
LOCAL = {"entmax", "sparsemax", "imle", "perturbed", "log_gate", "hard_concrete"}


@pytest.mark.parametrize(("name", "options"), LEARNING)
def test_gradient_reaches_every_valid_score(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(200, 7, requires_grad=True)
    valid = torch.arange(7) < 6
    value = carrier(choose(name, options, scores, 3, valid))
    gradient = torch.autograd.grad((value * torch.randn(value.shape)).sum(), scores)[0]
    assert (gradient[:, 6] == 0).all()
    reached = gradient[:, :6] != 0
    assert reached.any(0).all() if name in LOCAL else reached.all()
    # but for scores that are each for themselves: one number added to all changes nothing
    if name not in ("hard_concrete", "perturbed") and options.get("surrogate") not in ("sigmoid", "identity"):
        assert gradient.sum(-1).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "options"), LEARNING)
def test_without_a_choice_the_scores_stay_in_the_graph(name: str, options: dict[str, Any]) -> None:
    """A budget that keeps everything gives a zero gradient, not None (distributed training counts on it)."""
    scores = torch.randn(2, 4, requires_grad=True)
    value = carrier(choose(name, options, scores, 4))
    assert torch.equal(torch.autograd.grad(value.sum(), scores)[0], torch.zeros(2, 4))


@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v.values[0] != "soft"])
def test_evaluation_is_the_deterministic_top_k(name: str, options: dict[str, Any]) -> None:
    scores, k, valid = mixed_rows()
    for _ in range(2):
        choice = choose(name, options, scores, k, valid, training=False)
        assert torch.equal(choice.mask, topk_mask(scores, k, valid))
        assert choice.log_prob is None


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_leading_dimensions_do_not_matter(name: str, options: dict[str, Any]) -> None:
    """A row alone, and a row under dimensions of size 1, as in a batch of one."""
    scores, weight = torch.randn(6, requires_grad=True), torch.randn(6)
    results = []
    for shape in ((1, 6), (6,), (1, 1, 1, 6)):
        torch.manual_seed(1)
        choice = choose(name, options, scores.view(shape), 3)
        value = choice.mask.float() if carrier(choice) is None else carrier(choice)
        total = (value.view(-1, 1) * weight).sum() + 0 * scores.sum()
        results.append((choice.mask.view(6), torch.autograd.grad(total, scores)[0]))
    for mask, gradient in results[1:]:
        assert torch.equal(mask, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_same_noise_same_choice(name: str, options: dict[str, Any]) -> None:
    scores, k, valid = mixed_rows()
    first, second = (torch.manual_seed(1) and choose(name, options, scores, k, valid) for _ in range(2))
    assert torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("training", [True, False])
def test_soft_keeps_everything_valid(training: bool) -> None:
    scores, k, valid = mixed_rows()
    choice = choose("soft", {}, scores, k, valid, training=training)
    assert torch.equal(choice.mask, valid) and torch.equal(choice.gates, valid.float())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("straight_through", {"surrogate": "sigmoyd"}, "unknown surrogate 'sigmoyd'.*'identity'.*mean 'sigmoid'"),
        ("reinforce", {"law": "plackett"}, "unknown law 'plackett'.*'conditional_bernoulli', 'plackett_luce'"),
        ("gumbel_rao", {"draws": 0}, "draws=0 is out of range at estimator gumbel_rao; it counts noises, >= 1"),
        ("perturbed", {"draws": 1}, "draws=1 is out of range.*2 noises or more. The paper takes 500"),
        ("perturbed", {"sigma": 0.0}, "sigma=0.0 is out of range.*> 0"),
        ("imle", {"strength": -1.0}, "strength=-1.0 is out of range.*> 0"),
        ("imle", {"noise": "gumble"}, "unknown noise 'gumble'.*mean 'gumbel'"),
        ("hard_concrete", {"temper": 0.0}, "temper=0.0 is out of range.*> 0"),
        ("hard_concrete", {"stiffness": -1.0}, "stiffness=-1.0 is out of range.*>= 0"),
        ("entmax", {"alpha": 1.0}, "alpha=1.0 is out of range.*1.5 is usual"),
    ],
)
def test_unknown_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HardAttentionError, match=message):
        registry.load("estimators", name)(**options)


def test_sparsemax_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "entmax", None)
    with pytest.raises(ImportError, match=r"sparsemax needs the package 'entmax'.*hf-hardattn\[entmax\]"):
        build("sparsemax")


# ---------------------------------------------------------------- gradients against enumeration


def exact_gradient(scores: Tensor, k: int, law: str, reward: Any) -> Tensor:
    """``d/ds sum_S p(S) reward(S)`` by enumeration in float64; Plackett-Luce by looping over orders."""
    leaf = scores.double().requires_grad_()
    n, total = len(scores), leaf.new_zeros(())
    if law == "conditional_bernoulli":
        chosen = list(itertools.combinations(range(n), k))
        logits = torch.stack([leaf[list(c)].sum() for c in chosen]).log_softmax(0)
    else:
        chosen, logits = list(itertools.permutations(range(n), k)), []
        for order in chosen:
            left, log = list(range(n)), leaf.new_zeros(())
            for pick in order:
                log = log + leaf[pick] - leaf[left].logsumexp(0)
                left.remove(pick)
            logits.append(log)
    for order, log in zip(chosen, logits, strict=True):
        mask = torch.zeros(n, dtype=torch.float64)
        mask[list(order)] = 1.0
        total = total + log.exp() * reward(mask)
    return torch.autograd.grad(total, leaf)[0]


def sampled_gradients(
    name: str, options: dict[str, Any], scores: Tensor, k: int, reward: Any, draws: int, **sampling: Any
) -> Tensor:
    """One gradient estimate per row, ``[draws, n]``."""
    rows = scores.repeat(draws, 1).requires_grad_()
    choice = choose(name, options, rows, k, **sampling)
    if choice.log_prob is not None:
        loss = (reward(choice.mask.double()).float() * choice.log_prob).sum()
    else:
        loss = reward(choice.gates.double()).sum()
    return torch.autograd.grad(loss, rows)[0].double()


def largest_z(gradients: Tensor, exact: Tensor) -> float:
    error = gradients.std(0) / math.sqrt(len(gradients))
    # a deterministic estimator has no spread: any deviation above fp32 rounding counts
    return ((gradients.mean(0) - exact).abs() / (error + 1e-6)).max().item()


def linear(z: Tensor) -> Tensor:
    return z @ torch.linspace(-1, 2, z.shape[-1], dtype=torch.float64)


def curved(z: Tensor) -> Tensor:
    """A loss that no polynomial of low degree equals: the difference between biased and unbiased shows."""
    return torch.exp(z @ torch.linspace(-1, 1.5, z.shape[-1], dtype=torch.float64))


@pytest.mark.parametrize("law", ["plackett_luce", "conditional_bernoulli"])
@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 3), (5, 1)])
def test_reinforce_is_unbiased(law: str, n: int, k: int) -> None:
    """200 000 draws; every component within 4.5 standard errors (fixed seed)."""
    torch.manual_seed(n * k)
    scores = torch.randn(n)
    gradients = sampled_gradients("reinforce", {"law": law}, scores, k, curved, 200_000)
    assert largest_z(gradients, exact_gradient(scores, k, law, curved)) < 4.5


@pytest.mark.parametrize(("name", "options"), variants("reinforce", "rloo", "sfess", "simple", "reinmax"))
def test_temperature_divides_the_scores_of_the_law(name: str, options: dict[str, Any]) -> None:
    scores, results = torch.randn(3, 6, requires_grad=True), []
    for temperature, given in ((0.5, scores), (1.0, scores / 0.5)):
        torch.manual_seed(1)
        choice = choose(name, options, given, 2, temperature=temperature)
        value = carrier(choice) * (1 if choice.gates is None else torch.arange(6))
        results.append((choice.mask, value, torch.autograd.grad(value.sum(), scores)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("n", "k"), [(5, 1), (6, 3), (6, 5)])
@pytest.mark.parametrize("sample", [True, False])
def test_simple_is_exact_for_a_linear_loss(n: int, k: int, sample: bool) -> None:
    """Every single estimate, not only their mean."""
    torch.manual_seed(n + k)
    scores = torch.randn(n)
    gradients = sampled_gradients("simple", {"sample": sample}, scores, k, linear, 20)
    exact = exact_gradient(scores, k, "conditional_bernoulli", linear)
    torch.testing.assert_close(gradients, exact.expand(20, n), atol=2e-6, rtol=1e-5)


def law_of(name: str, options: dict[str, Any]) -> str:
    """The law that a variant draws from, or comes near."""
    orders = name in ("gumbel", "gumbel_rao", "imle", "perturbed", "rloo") and options.get("noise") != "sum_of_gamma"
    return options.get("law", "plackett_luce" if orders else "conditional_bernoulli")


@pytest.mark.parametrize(("name", "options"), LEARNING)
def test_declared_bias_is_the_measured_one(name: str, options: dict[str, Any]) -> None:
    """On a curved loss: within 4.5 standard errors of the exact gradient if unbiased, more than 8 away if biased."""
    torch.manual_seed(7)
    scores, law = torch.randn(6), law_of(name, options)
    if name == "perturbed":
        options = {**options, "draws": 10}
    biased = registry.load("estimators", name).biased
    gradients = sampled_gradients(name, options, scores, 3, curved, 40_000 if biased else 100_000)
    z = largest_z(gradients, exact_gradient(scores, 3, law, curved))
    assert z > 8 if biased else z < 4.5


@pytest.mark.parametrize("law", ["plackett_luce", "conditional_bernoulli"])
def test_exploration_is_unbiased_for_the_mixture(law: str) -> None:
    """The uniform part has no gradient: that of the mixture is 0.6 of the law's, in expectation."""
    torch.manual_seed(3)
    scores = torch.randn(5)
    gradients = sampled_gradients("reinforce", {"law": law}, scores, 2, curved, 200_000, exploration=0.4)
    assert largest_z(gradients, 0.6 * exact_gradient(scores, 2, law, curved)) < 4.5


@pytest.mark.parametrize(("name", "options"), GATED)
def test_exploration_keeps_uniform_positions_and_the_gradient(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    scores, weight = torch.linspace(-9, 9, 6).repeat(4000, 1).requires_grad_(), torch.randn(4000, 6)
    choice = choose(name, options, scores, 2, exploration=1.0)
    assert torch.equal(choice.gates, choice.mask.float()) and (choice.mask.sum(-1) == 2).all()
    assert (choice.mask.float().mean(0) - 1 / 3).abs().max() < 4.5 * math.sqrt(2 / 9 / 4000)
    torch.manual_seed(0)
    torch.randn(4000, 6)
    plain = choose(name, options, scores, 2)
    gradients = [torch.autograd.grad((c.gates * weight).sum(), scores)[0] for c in (choice, plain)]
    if not options.get("adaptive"):
        assert torch.equal(*gradients)


@pytest.mark.parametrize(("name", "options"), [v for v in HARD if v.values[0] != "variational"])
@pytest.mark.parametrize("kind", ["number", "rows"])
def test_backward_temperature_is_the_gradients_alone(name: str, options: dict[str, Any], kind: str) -> None:
    """Forward as without; backward, where nothing is sampled, as at that temperature. A tensor of rows does the same."""
    torch.manual_seed(0)
    scores, weight, results = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6), []
    backward = 2.0 if kind == "number" else torch.full((3, 1), 2.0)
    for how in ({"backward_temperature": backward}, {}, {"temperature": 2.0}):
        torch.manual_seed(1)
        choice = choose(name, options, scores, 3, **how)
        results.append((choice.mask, choice.gates, torch.autograd.grad((choice.gates * weight).sum(), scores)[0]))
    (mask, gates, gradient), (plain_mask, plain_gates, plain), (_, _, warm) = results
    assert torch.equal(mask, plain_mask) and torch.equal(gates, plain_gates)
    # one has no temperature, one finds its own step
    assert torch.equal(gradient, plain) is (options.get("surrogate") == "identity" or options.get("adaptive", False))
    if name in ("straight_through", "gumbel", "entmax", "sparsemax", "log_gate", "perturbed"):
        torch.testing.assert_close(gradient, warm)


# ---------------------------------------------------------------- published values


def toy(seed: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, ``[S, 10]`` masks, p(S) by the library's law, and f(S) = ||mask - b||^2."""
    random = numpy.random.RandomState(seed)
    scores = torch.tensor(random.randn(10), dtype=dtype).requires_grad_()
    b = torch.tensor(numpy.abs(random.randn(10)))
    masks = torch.zeros(math.comb(10, k), 10, dtype=torch.bool)
    for row, chosen in enumerate(itertools.combinations(range(10), k)):
        masks[row, list(chosen)] = True
    law = ConditionalBernoulli(scores.expand(len(masks), 10), torch.tensor(k), torch.ones(10, dtype=torch.bool), k)
    return scores, masks, law.log_prob(masks).exp(), ((masks.double() - b) ** 2).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_simple_paper_toy(seed: int, dtype: torch.dtype) -> None:
    scores, _, p, f = toy(seed, 5, dtype)
    mean = (p * f).sum()
    norm = torch.autograd.grad(mean, scores)[0].norm()
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    for value, published in zip((mean, f.min(), norm), SEEDS[seed], strict=True):
        assert value.item() == pytest.approx(published, abs=tolerance)


def test_simple_paper_toy_with_one_position() -> None:
    _, _, p, f = toy(1234, 1, torch.float64)
    assert (p * f).sum().item() == pytest.approx(11.286426, abs=1e-6)
    assert f.min().item() == pytest.approx(8.756282, abs=1e-6)


# ---------------------------------------------------------------- surrogates and relaxation


def test_straight_through_surrogates() -> None:
    """Backward of each surrogate against its formula."""
    torch.manual_seed(0)
    scores, weight = torch.randn(6, requires_grad=True), torch.randn(6)
    middle = scores.detach().sort(descending=True).values[1:3].mean()
    formulas = {
        "sigmoid": lambda s: torch.sigmoid((s - middle) / 0.5),
        "softmax": lambda s: 2 * torch.softmax(s / 0.5, -1),
        "identity": lambda s: s,
    }
    for surrogate, formula in formulas.items():
        choice = choose("straight_through", {"surrogate": surrogate}, scores, 2, temperature=0.5)
        wanted = torch.autograd.grad((formula(scores) * weight).sum(), scores)[0]
        torch.testing.assert_close(torch.autograd.grad((choice.gates * weight).sum(), scores)[0], wanted)


def relax_by_loop(noisy: Tensor, k: int, temperature: float) -> Tensor:
    """The k rounds of Xie & Ermon, as written in the docstring."""
    khot = torch.zeros_like(noisy)
    for _ in range(k):
        share = (noisy / temperature).softmax(-1)
        khot = khot + share
        noisy = noisy + torch.log(1 - share)
    return khot


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gumbel_relaxation_equals_the_algorithm(temperature: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 6, requires_grad=True)
    k = torch.tensor([1, 2, 3, 5])
    torch.manual_seed(1)
    choice = choose("gumbel", {"hard": False}, scores, k, temperature=temperature)
    torch.manual_seed(1)
    uniform, weight = torch.rand(4, 6).double(), torch.randn(4, 6).double()
    noisy = scores.double() - torch.log(-torch.log(uniform))
    wanted = torch.stack([relax_by_loop(row, int(count), temperature) for row, count in zip(noisy, k, strict=True)])
    torch.testing.assert_close(choice.gates.double(), wanted, atol=2e-5, rtol=1e-4)
    gradient = torch.autograd.grad((choice.gates * weight).sum(), scores, retain_graph=True)[0]
    exact = torch.autograd.grad((wanted * weight).sum(), scores)[0]
    torch.testing.assert_close(gradient, exact, atol=2e-4, rtol=2e-3)


def test_gumbel_relaxation_becomes_the_sample() -> None:
    """At a low temperature, and with leads of hundreds, no position is taken twice."""
    torch.manual_seed(0)
    scores = torch.tensor([[300.0, 0.0, -1.0, 100.0, -200.0]]).repeat(20, 1)
    for k in range(1, 5):
        choice = choose("gumbel", {"hard": False}, scores, k, temperature=0.01)
        torch.testing.assert_close(choice.gates, choice.mask.float(), atol=0.05, rtol=0)


def test_gumbel_hard_and_relaxed_share_sample_and_gradient() -> None:
    scores, weight, results = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), []
    for hard in (True, False):
        torch.manual_seed(2)
        choice = choose("gumbel", {"hard": hard}, scores, 3)
        results.append((choice.mask, torch.autograd.grad((choice.gates * weight).sum(), scores)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_simple_without_sampling_keeps_the_top_k() -> None:
    scores, k, valid = mixed_rows()
    assert torch.equal(choose("simple", {"sample": False}, scores, k, valid).mask, topk_mask(scores, k, valid))


# ---------------------------------------------------------------- Gumbel-Rao


@pytest.mark.parametrize("draws", [1, 10])
@pytest.mark.parametrize("k", [1, 3])
def test_gumbel_rao_has_the_mean_of_gumbel_and_less_variance(k: int, draws: int) -> None:
    """60 000 gradients each: every component of the means within 4.5 standard errors; at 10 draws every variance is lower."""
    torch.manual_seed(k)
    scores = torch.randn(6)
    rao = sampled_gradients("gumbel_rao", {"draws": draws}, scores, k, curved, 60_000, temperature=0.7)
    plain = sampled_gradients("gumbel", {}, scores, k, curved, 60_000, temperature=0.7)
    error = ((rao.var(0) + plain.var(0)) / 60_000).sqrt()
    assert ((rao.mean(0) - plain.mean(0)).abs() / error).max() < 4.5
    if draws == 10:
        assert (rao.var(0) < plain.var(0)).all()


def test_conditional_noise_has_the_law_of_the_noise() -> None:
    """Draw an order, then the noisy scores given it: together they are the noisy scores. 50 000 rows, Kolmogorov-Smirnov
    at p = 0.001 for every score, every difference and the largest; and each draw has the order it was given."""
    from hf_hardattn.estimators.gumbel_rao import conditional

    torch.manual_seed(0)
    n, k, rows = 5, 3, 50_000
    scores, valid = torch.randn(n).expand(rows, n), torch.arange(n) != 3
    law = PlackettLuce(scores, torch.tensor(k), valid, k)
    order = law.outcome(torch.rand(rows, n))
    noisy = conditional(law, order, torch.rand(2, rows, n))
    assert torch.equal(noisy.masked_fill(~valid, -1e30).topk(k).indices, order.expand(2, rows, k))

    def distance(values: Tensor, cdf: Tensor) -> float:
        order = values.argsort()
        steps = torch.arange(1, rows + 1) / rows
        return (cdf[order] - steps).abs().max().item()

    limit, w, s = 1.95 / math.sqrt(rows), noisy[1], scores[0]
    for i in (0, 1, 2, 4):
        assert distance(w[:, i], torch.exp(-torch.exp(s[i] - w[:, i]))) < limit
        for j in range(i):
            if j != 3:
                assert distance(w[:, i] - w[:, j], torch.sigmoid(w[:, i] - w[:, j] - s[i] + s[j])) < limit
    top = w[:, valid].amax(-1)
    assert distance(top, torch.exp(-torch.exp(s[valid].logsumexp(0) - top))) < limit


# ---------------------------------------------------------------- ReinMax


def quadratic(z: Tensor) -> Tensor:
    n = z.shape[-1]
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return ((z @ matrix) * z).sum(-1) + linear(z)


@pytest.mark.parametrize(("n", "k"), [(5, 1), (6, 2), (6, 3), (6, 5)])
def test_reinmax_is_exact_for_a_quadratic_loss(n: int, k: int) -> None:
    """100 000 draws, every component within 4.5 standard errors; SIMPLE is more than 30 away."""
    torch.manual_seed(n + k)
    scores = torch.randn(n)
    exact = exact_gradient(scores, k, "conditional_bernoulli", quadratic)
    assert largest_z(sampled_gradients("reinmax", {}, scores, k, quadratic, 100_000), exact) < 4.5
    assert largest_z(sampled_gradients("simple", {}, scores, k, quadratic, 100_000), exact) > 30


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.7])
def test_reinmax_with_one_position_is_the_published_one(tau: float) -> None:
    """``2 J(pi1) v - J(p) v / 2``, ``pi1 = (softmax(s / tau) + z) / 2``, draw by draw; tau below 1 counts as 1."""
    torch.manual_seed(0)
    scores, v = torch.randn(50, 6, requires_grad=True), torch.randn(50, 6)
    choice = choose("reinmax", {}, scores, 1, temperature=0.8, backward_temperature=0.8 * tau)
    found = torch.autograd.grad((choice.gates * v).sum(), scores)[0]

    def jacobian(q: Tensor) -> Tensor:
        return q * (v - (q * v).sum(-1, keepdim=True))

    theta = scores.detach() / 0.8
    pi = ((theta / max(tau, 1.0)).softmax(-1) + choice.mask.float()) / 2
    wanted = (2 * jacobian(pi) - 0.5 * jacobian(theta.softmax(-1))) / 0.8
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- perturbed top-k


def test_perturbed_of_two_positions_has_a_closed_form() -> None:
    """``P(first is kept) = Phi((s_1 - s_2) / (sigma sqrt 2))``: value and derivative within 5 standard errors at 400 000 draws."""
    scores = torch.tensor([[0.3, -0.4]], requires_grad=True)
    torch.manual_seed(0)
    choice = choose("perturbed", {"draws": 400_000, "sigma": 0.6, "hard": False}, scores, 1, temperature=1.5)
    scale = 0.6 * 1.5 * math.sqrt(2)
    law = torch.distributions.Normal(0.0, scale)
    assert abs(choice.gates[0, 0] - law.cdf(torch.tensor(0.7))) < 5 * 0.5 / math.sqrt(400_000)
    slope = law.log_prob(torch.tensor(0.7)).exp()
    gradient = torch.autograd.grad(choice.gates[0, 0], scores)[0][0]
    assert (gradient - torch.stack([slope, -slope])).abs().max() < 5 / 0.9 / math.sqrt(400_000)


def test_perturbed_gradient_is_that_of_the_smoothed_map() -> None:
    """The Jacobian at 400 000 draws against central differences of the smoothed map with the same noise."""
    scores = torch.tensor([[0.6, -0.3, 0.1, 1.1, -1.0]], requires_grad=True)
    options, h = {"draws": 400_000, "sigma": 0.8, "hard": False}, 0.1

    def smoothed(at: Tensor) -> Tensor:
        torch.manual_seed(1)
        return choose("perturbed", options, at, 2).gates[0]

    value, hard = smoothed(scores), choose("perturbed", {**options, "hard": True, "draws": 10}, scores, 2)
    assert hard.gates.tolist() == hard.mask.tolist() == [[True, False, False, True, False]]
    jacobian = torch.stack([torch.autograd.grad(gate, scores, retain_graph=True)[0][0] for gate in value])
    steps = h * torch.eye(5).unsqueeze(1)
    differences = torch.stack([(smoothed(scores + d) - smoothed(scores - d)) / (2 * h) for d in steps], 1)
    assert (jacobian - differences).abs().max() < 0.01 and jacobian.abs().max() > 0.2


# ---------------------------------------------------------------- I-MLE


def test_imle_is_a_difference_of_choices() -> None:
    """Against a loop: the top k of the noisy scores, before and after the step."""
    scores, weight = torch.randn(4, 6, requires_grad=True), 3 * torch.randn(4, 6)
    options = {"adaptive": False, "strength": 0.7}
    torch.manual_seed(1)
    choice = choose("imle", options, scores, 2, temperature=0.5, backward_temperature=2.0)
    gradient = torch.autograd.grad((choice.gates * weight).sum(), scores)[0]
    torch.manual_seed(1)
    noisy, step = scores.detach() - 0.5 * torch.log(-torch.log(torch.rand(4, 6))), 0.7 * 2.0
    for row in range(4):
        before, after = (set(w.topk(2).indices.tolist()) for w in (noisy[row], noisy[row] - step * weight[row]))
        assert set(choice.mask[row].nonzero().flatten().tolist()) == before
        wanted = [((i in before) - (i in after)) / step for i in range(6)]
        torch.testing.assert_close(gradient[row], torch.tensor(wanted))
    assert (gradient != 0).any()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_sum_of_gamma_has_its_moments(k: int) -> None:
    """Mean ``(H_10 - log 10) / k``, variance ``sum 1 / i^2 / k``, within 5 standard errors of 200 000 draws."""
    from hf_hardattn.estimators.imle import sum_of_gamma

    torch.manual_seed(k)
    noise = sum_of_gamma(torch.tensor([[k]]), (200_000, 1), Sampling(uniform=torch.rand)).double()
    harmonic, squares = (sum(i**-p for i in range(1, 11)) for p in (1, 2))
    error = noise.std() / math.sqrt(200_000)
    assert abs(noise.mean() - (harmonic - math.log(10)) / k) < 5 * error
    spread = (noise - noise.mean()) ** 2
    assert abs(spread.mean() - squares / k) < 5 * spread.std() / math.sqrt(200_000)


def test_imle_finds_its_step_whatever_the_scale_of_the_loss() -> None:
    """One nonzero entry a row on average, for losses 1e-6 and 1e6 times as large; the state is not the model's."""
    found = []
    for scale in (1e-6, 1e6):
        torch.manual_seed(0)
        estimator, weight = build("imle"), scale * torch.randn(64, 8)
        assert estimator.state is None and not estimator.state_dict()
        for _ in range(400):
            scores = torch.randn(64, 8, requires_grad=True)
            choice = choose(estimator, {}, scores, 3)
            gradient = torch.autograd.grad((choice.gates * weight).sum(), scores)[0]
        assert not estimator.state_dict() and 0.8 < estimator.state[1] < 1.2
        found.append((estimator.state, gradient / gradient.norm()))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    state = estimator.state
    choose(estimator, {}, torch.randn(4, 8), 3, training=False)
    scores = torch.randn(4, 8, requires_grad=True)
    choose(estimator, {}, scores, 8).gates.sum().backward()  # no row has a choice
    assert torch.equal(estimator.state, state)


# ---------------------------------------------------------------- entmax and sparsemax


def test_entmax_readme_values() -> None:
    """The examples of the entmax package's README, k = 1 and 2."""
    scores = torch.tensor([[-2.0, 0.0, 0.5]])
    for name, options, k, wanted in (
        ("sparsemax", {}, 1, [0.0, 0.25, 0.75]),
        ("entmax", {}, 1, [0.0, 0.3260, 0.6740]),
        ("sparsemax", {}, 2, [0.0, 1.0, 1.0]),
        ("entmax", {"alpha": 2.0}, 1, [0.0, 0.25, 0.75]),
        ("entmax", {"alpha": 1.001}, 1, [0.0486, 0.3592, 0.5922]),
    ):
        gates = choose(name, {**options, "hard": False}, scores, k).gates[0]
        torch.testing.assert_close(
            gates, torch.tensor(wanted), atol=1e-4 if options.get("alpha") != 1.001 else 2e-3, rtol=0
        )


def test_entmax_agrees_with_the_package() -> None:
    """alpha = 1.5 at k = 1, alpha = 2 at any k: values and gradients."""
    import entmax

    torch.manual_seed(0)
    scores, weight = torch.randn(20, 9, requires_grad=True), torch.randn(20, 9)
    pairs = [("entmax", {"alpha": 1.5}, 1, entmax.entmax15(scores / 0.5))]
    for k in (1, 2, 4, 8):
        other = entmax.budget_bisect(scores / 0.5, k)
        pairs += [("sparsemax", {}, k, other), ("entmax", {"alpha": 2.0}, k, other)]
    for name, options, k, other in pairs:
        gates = choose(name, {**options, "hard": False}, scores, k, temperature=0.5).gates
        torch.testing.assert_close(gates, other, atol=2e-6, rtol=1e-5)
        found, wanted = (torch.autograd.grad((p * weight).sum(), scores, retain_graph=True)[0] for p in (gates, other))
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9])
def test_capped_entmax_solves_its_problem(alpha: float) -> None:
    """Optimality in float64: on 0 < p < 1 the derivative of the objective is one number, above it at p = 1, below at 0; and
    the gradient against central differences."""
    torch.manual_seed(0)
    scores, weight = 2 * torch.randn(12, 7, dtype=torch.float64), torch.randn(12, 7, dtype=torch.float64)

    def gates(at: Tensor) -> Tensor:
        return choose("entmax", {"alpha": alpha, "hard": False}, at, 3).gates

    p = gates(scores)
    torch.testing.assert_close(p.sum(-1), torch.full((12,), 3.0, dtype=torch.float64), atol=1e-6, rtol=0)
    slope = scores - p ** (alpha - 1) / (alpha - 1)
    for row, at in zip(slope, p, strict=True):
        inner = row[(at > 0) & (at < 1)]
        if len(inner):
            assert inner.max() - inner.min() < 1e-5
            assert (row[at == 1] > inner.min() - 1e-5).all() and (row[at == 0] < inner.max() + 1e-5).all()
    leaf = scores.clone().requires_grad_()
    found = torch.autograd.grad((gates(leaf) * weight).sum(), leaf)[0]
    for i in range(7):
        step = 1e-4 * torch.eye(7, dtype=torch.float64)[i]
        difference = ((gates(scores + step) - gates(scores - step)) * weight).sum(-1) / 2e-4
        torch.testing.assert_close(found[:, i], difference, atol=2e-3, rtol=1e-2)


# ---------------------------------------------------------------- hard concrete


def test_hard_concrete_expects_what_it_keeps() -> None:
    """The closed form of E[L0], read off the penalty at multiplier 1, against 200 000 draws: within 4.5 standard errors."""
    torch.manual_seed(0)
    estimator = build("hard_concrete", {"stiffness": 0.0})
    estimator.multiplier.data.fill_(1.0)
    scores = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    choice = choose(estimator, {}, scores.expand(200_000, 5), 2, temperature=0.7)
    expected = choice.penalty[0].item() * 5 + 2
    # a row that would keep nothing keeps one: it adds its probability
    off = 1 - (scores / 0.7 + 2 / 3 * math.log(11)).sigmoid()
    kept = choice.mask.sum(-1).double()
    assert expected == pytest.approx((5 - off.sum()).item(), abs=1e-5)
    assert abs(kept.mean() - expected - off.prod()) < 4.5 * kept.std() / math.sqrt(200_000)
    assert ((choice.gates == 1).any() and ((choice.gates > 0) & (choice.gates < 1)).any()) and kept.min() == 1


@pytest.mark.parametrize(("start", "k"), [(1.0, 2), (-1.0, 6)])
def test_hard_concrete_multiplier_climbs_to_the_rate(start: float, k: int) -> None:
    """One optimizer for scores and multiplier, against a task that pulls the other way: within 0.05 of the rate."""
    torch.manual_seed(0)
    estimator, scores = build("hard_concrete"), torch.nn.Parameter(start + 0.1 * torch.randn(8))
    optimizer = torch.optim.Adam([scores, *estimator.parameters()], lr=0.02)
    worth, rates = 0.1 * start * torch.rand(8), []
    for step in range(800):
        choice = choose(estimator, {}, scores.expand(32, 8), k)
        optimizer.zero_grad()
        (choice.penalty.mean() - (worth * choice.gates).sum(-1).mean()).backward()
        optimizer.step()
        rates.append(choice.mask.float().mean().item())
        if step == 0:  # over the rate it grows, below it falls
            assert (estimator.multiplier * start > 0).all()
    assert abs(sum(rates[-200:]) / 200 - k / 8) < 0.05
    estimator.reset_parameters()
    assert estimator.multiplier.tolist() == [0.0]


# ---------------------------------------------------------------- log gate


def test_log_gate_is_added_to_the_logits() -> None:
    """Its gradient through gated attention is that of ``softmax(logits + log g)`` over the kept, at g = 1 or at g."""
    from hf_hardattn.attention import gated_attend

    torch.manual_seed(0)
    scores, weight = torch.randn(1, 1, 2, 6, requires_grad=True), torch.randn(1, 1, 2, 4)
    query, key, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    for hard in (True, False):
        choice = choose("log_gate", {"hard": hard}, scores, 3, temperature=0.5)
        output, _ = gated_attend(query, key, value, choice.gates, scale=0.5)
        log_gate = (scores / 0.5).masked_fill(~choice.mask, -1e30)
        log_gate = log_gate - log_gate.detach() if hard else log_gate
        logits = (query @ key.transpose(-1, -2) * 0.5).masked_fill(~choice.mask, -1e30)
        wanted = (logits + log_gate).softmax(-1) @ value
        torch.testing.assert_close(output, wanted)
        gradients = [torch.autograd.grad((o * weight).sum(), scores, retain_graph=True)[0] for o in (output, wanted)]
        torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- soak


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({v.values[0] for v in LEARNING}))
def test_soak(name: str) -> None:
    """10 000 optimisation steps of bf16 and 10 000 of fp16 scores at temperature 0.1 (eight runs of 1 250 each, side by side),
    towards choices that change their worth now and then: nothing but numbers."""
    torch.manual_seed(0)
    estimator = build(name)
    halves = [torch.nn.Parameter(torch.randn(8, 4).to(dtype)) for dtype in (torch.bfloat16, torch.float16)]
    optimizer = torch.optim.SGD([*halves, *estimator.parameters()], lr=0.3, momentum=0.9, weight_decay=1e-3)
    k = torch.tensor([1, 2, 3, 2]).repeat(4)
    valid = torch.arange(4) < torch.tensor([4, 4, 4, 3]).repeat(4).unsqueeze(-1)
    largest = torch.zeros(())
    for step in range(1_250):
        if step % 125 == 0:
            worth = 3 * torch.randn(16, 4)
        choice = choose(estimator, {}, torch.cat([half.float() for half in halves]), k, valid, temperature=0.1)
        if choice.gates is None:
            reward = (choice.mask * worth).sum(-1)
            loss = -((reward - reward.mean()) * choice.log_prob).sum()
        else:
            loss = -torch.tanh((choice.gates * worth).sum(-1)).sum()
        for extra in (choice.penalty, choice.entropy):
            loss = loss if extra is None else loss + 0.01 * extra.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for value in (loss, *halves):
            largest = torch.maximum(largest, value.detach().float().abs().max())  # NaN stays NaN
    assert largest.isfinite()
