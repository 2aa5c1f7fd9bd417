"""Estimators: one contract for all of them, and their mean gradients against exact enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from hf_hardattn import registry
from hf_hardattn.errors import HardAttentionError
from hf_hardattn.estimators import Choice
from hf_hardattn.laws import ConditionalBernoulli
from hf_hardattn.selection import topk_mask

NAMES = registry.names("estimators")
KEEPS_ALL = {"soft"}  # by design: no budget, no gradient
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "straight_through": [{"surrogate": "sigmoid"}, {"surrogate": "softmax"}, {"surrogate": "identity"}],
    "gumbel": [{"hard": True}, {"hard": False}],
    "simple": [{"sample": True}, {"sample": False}],
    "reinforce": [{"law": "plackett_luce"}, {"law": "conditional_bernoulli"}],
}
VARIANTS = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name in NAMES
    for options in OPTIONS.get(name, [{}])
]
CHOOSERS = [variant for variant in VARIANTS if variant.values[0] not in KEEPS_ALL]


def choose(
    name: str,
    options: dict[str, Any],
    scores: Tensor,
    k: Tensor | int,
    valid: Tensor | None = None,
    training: bool = True,
    temperature: float = 1.0,
) -> Choice:
    k = torch.as_tensor(k)
    valid = torch.ones(scores.shape, dtype=torch.bool) if valid is None else valid.expand_as(scores)
    return registry.load("estimators", name)(**options).choose(
        scores,
        k.expand(scores.shape[:-1]),
        valid,
        slots=max(1, int(k.max())),
        training=training,
        temperature=temperature,
        uniform=torch.rand,
    )


def mixed_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[2, 3, 4, 9]`` with their own k and padding; k = 0, k > valid and all-padding rows among them."""
    torch.manual_seed(5)
    scores = 4 * torch.randn(2, 3, 4, 9)
    k = torch.randint(0, 8, (2, 3, 4))
    valid = torch.rand(2, 3, 4, 9) < 0.7
    valid[0, 0], valid[0, 1] = False, True
    return scores, k, valid


@pytest.mark.parametrize("name", NAMES)
def test_declares_its_facts(name: str) -> None:
    estimator = registry.load("estimators", name)
    assert isinstance(estimator.biased, bool) and isinstance(estimator.pathwise, bool) and estimator.source
    assert "Source:" in estimator.__doc__


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("name", "options"), CHOOSERS)
def test_keeps_exactly_the_budget_and_stays_finite(name: str, options: dict[str, Any], temperature: float) -> None:
    scores, k, valid = mixed_rows()
    scores.requires_grad_()
    choice = choose(name, options, scores, k, valid, temperature=temperature)
    assert choice.mask.dtype == torch.bool and choice.mask.shape == scores.shape
    assert torch.equal(choice.mask.sum(-1), torch.minimum(k, valid.sum(-1)))
    assert not (choice.mask & ~valid).any()
    loss = scores.new_zeros(())
    for value in (choice.gates, choice.log_prob, choice.entropy):
        if value is not None:
            assert value.dtype == torch.float32 and value.isfinite().all()
            loss = loss + (value * torch.rand(value.shape)).sum()
    gradient = torch.autograd.grad(loss, scores)[0]
    assert gradient.isfinite().all() and (gradient[~valid] == 0).all()
    # no choice, no gradient: not even rounding noise
    fixed = (k == 0) | (k >= valid.sum(-1))
    assert fixed.any() and (gradient[fixed] == 0).all()
    if choice.gates is not None:
        hard = choice.mask if options.get("hard", True) else choice.mask & fixed.unsqueeze(-1)
        assert torch.equal(choice.gates[hard], torch.ones_like(choice.gates[hard]))
        assert (choice.gates[~valid] == 0).all()
        torch.testing.assert_close(choice.gates.sum(-1), choice.mask.sum(-1).float())
    for value in (choice.log_prob, choice.entropy):
        assert value is None or (value[fixed] == 0).all()


@pytest.mark.parametrize(("name", "options"), CHOOSERS)
def test_gradient_reaches_every_valid_score(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 7, requires_grad=True)
    valid = torch.arange(7) < 6
    choice = choose(name, options, scores, 3, valid)
    carrier = choice.gates if registry.load("estimators", name).pathwise else choice.log_prob
    loss = (carrier * torch.randn(carrier.shape)).sum()
    gradient = torch.autograd.grad(loss, scores)[0]
    assert (gradient[:, :6] != 0).all() and (gradient[:, 6] == 0).all()


@pytest.mark.parametrize(("name", "options"), CHOOSERS)
def test_without_a_choice_the_scores_stay_in_the_graph(name: str, options: dict[str, Any]) -> None:
    """A budget that keeps everything gives a zero gradient, not None (distributed training counts on it)."""
    scores = torch.randn(2, 4, requires_grad=True)
    choice = choose(name, options, scores, 4)
    carrier = choice.gates if registry.load("estimators", name).pathwise else choice.log_prob
    assert torch.equal(torch.autograd.grad(carrier.sum(), scores)[0], torch.zeros(2, 4))


@pytest.mark.parametrize(("name", "options"), CHOOSERS)
def test_evaluation_is_the_deterministic_top_k(name: str, options: dict[str, Any]) -> None:
    scores, k, valid = mixed_rows()
    for _ in range(2):
        choice = choose(name, options, scores, k, valid, training=False)
        assert torch.equal(choice.mask, topk_mask(scores, k, valid))
        assert choice.log_prob is None


@pytest.mark.parametrize(("name", "options"), CHOOSERS)
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
        (
            "straight_through",
            {"surrogate": "sigmoyd"},
            "unknown surrogate 'sigmoyd'.*'identity'.*mean 'sigmoid'",
        ),
        ("reinforce", {"law": "plackett"}, "unknown law 'plackett'.*'conditional_bernoulli', 'plackett_luce'"),
    ],
)
def test_unknown_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HardAttentionError, match=message):
        registry.load("estimators", name)(**options)


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


def sampled_gradients(name: str, options: dict[str, Any], scores: Tensor, k: int, reward: Any, draws: int) -> Tensor:
    """One gradient estimate per row, ``[draws, n]``."""
    rows = scores.repeat(draws, 1).requires_grad_()
    choice = choose(name, options, rows, k)
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


@pytest.mark.parametrize(("name", "options"), [v for v in CHOOSERS if v.values[0] in ("reinforce", "simple")])
def test_temperature_divides_the_scores_of_the_law(name: str, options: dict[str, Any]) -> None:
    scores, results = torch.randn(3, 6, requires_grad=True), []
    for temperature, given in ((0.5, scores), (1.0, scores / 0.5)):
        torch.manual_seed(1)
        choice = choose(name, options, given, 2, temperature=temperature)
        carrier = choice.log_prob if choice.gates is None else choice.gates * torch.arange(6)
        results.append((choice.mask, carrier, torch.autograd.grad(carrier.sum(), scores)[0]))
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


@pytest.mark.parametrize(("name", "options"), CHOOSERS)
def test_declared_bias_is_the_measured_one(name: str, options: dict[str, Any]) -> None:
    """On a curved loss: within 4.5 standard errors of the exact gradient if unbiased, more than 8 away if biased."""
    torch.manual_seed(7)
    scores = torch.randn(6)
    law = options.get("law", "plackett_luce" if name == "gumbel" else "conditional_bernoulli")
    z = largest_z(sampled_gradients(name, options, scores, 3, curved, 100_000), exact_gradient(scores, 3, law, curved))
    assert z > 8 if registry.load("estimators", name).biased else z < 4.5


# ---------------------------------------------------------------- published values

# E[f], min f and ||grad|| of the k = 5 of 10 toy of the SIMPLE paper (UCLA-StarAI/SIMPLE, tractable_dist), by seed
SEEDS = {
    1234: (8.685266, 2.736191, 0.919681),
    1067: (6.124165, 1.578321, 0.974374),
    9198: (18.538078, 10.331406, 1.576983),
    9453: (4.290573, 1.032026, 0.540664),
    6240: (5.478800, 0.937338, 0.630166),
    7044: (9.866188, 4.509174, 1.144156),
    1755: (6.724844, 0.852461, 0.859373),
    7898: (9.726144, 4.073988, 1.011363),
    3131: (9.900890, 4.316833, 0.897899),
    1277: (3.943447, 1.200142, 0.598090),
}


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
