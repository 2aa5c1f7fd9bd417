"""The two laws over k-subsets against enumeration, loops and a dynamic programme."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_hardattn.distributions import ConditionalBernoulli, PlackettLuce, gumbel_noise
from hf_hardattn.distributions import polynomial_tree as polynomials
from hf_hardattn.distributions.conditional_bernoulli import Categorical
from hf_hardattn.distributions.polynomial_tree import descend, outside, tree

LAWS = [PlackettLuce, ConditionalBernoulli]


def subsets(n: int, k: int) -> Tensor:
    """All k-subsets of n positions, bool ``[S, n]``."""
    masks = torch.zeros(math.comb(n, k), n, dtype=torch.bool)
    for row, chosen in enumerate(itertools.combinations(range(n), k)):
        masks[row, list(chosen)] = True
    return masks


def bernoulli_table(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks, their log-probabilities and log Z under the conditional Bernoulli law, by enumeration."""
    masks = subsets(scores.shape[-1], k)
    sums = (masks * scores).sum(-1)
    return masks, sums - sums.logsumexp(0), sums.logsumexp(0)


def plackett_luce_table(scores: Tensor, k: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """All ordered k-picks and their log-probabilities, by the loop of the definition."""
    orders, logs = list(itertools.permutations(range(len(scores)), k)), []
    for order in orders:
        left, total = list(range(len(scores))), scores.new_zeros(())
        for pick in order:
            total = total + scores[pick] - scores[left].logsumexp(0)
            left.remove(pick)
        logs.append(total)
    return orders, torch.stack(logs)


def set_probabilities(scores: Tensor, k: int, law: type) -> tuple[Tensor, Tensor]:
    """All k-subsets and their probabilities under a law, by enumeration."""
    masks, log_p, _ = bernoulli_table(scores, k)
    if law is ConditionalBernoulli:
        return masks, log_p.exp()
    rows = {frozenset(mask.nonzero().flatten().tolist()): row for row, mask in enumerate(masks)}
    total = [scores.new_zeros(())] * len(masks)
    for order, log in zip(*plackett_luce_table(scores, k), strict=True):
        total[rows[frozenset(order)]] = total[rows[frozenset(order)]] + log.exp()
    return masks, torch.stack(total)


def log_z_by_recurrence(scores: Tensor, k: int) -> Tensor:
    """``e_j <- e_j + e^s e_{j-1}`` over the positions one by one, in log space and float64."""
    table = torch.full((k + 1,), -1e300, dtype=torch.float64)
    table[0] = 0.0
    for score in scores.double():
        table = torch.cat([table[:1], torch.logaddexp(table[1:], table[:-1] + score)])
    return table[k]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("law", LAWS)
def test_without_a_slot_no_row_has_a_choice(law: type, n: int) -> None:
    """A row with nothing but its protected position: zeros, with a gradient of zero, and k counts as the slots."""
    scores = torch.randn(3, n, requires_grad=True)
    valid = torch.arange(n) < torch.tensor([[0], [1], [n]])
    for k in (0, 2):
        made = law(scores, torch.tensor(k), valid, 0)
        mask, log_prob = made.draw(torch.rand(3, n))
        assert not mask.any() and not made.free.any() and (log_prob == 0).all() and (made.entropy() == 0).all()
        (gradient,) = torch.autograd.grad((log_prob + made.entropy()).sum(), scores)
        assert torch.equal(gradient, torch.zeros(3, n))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 9])
def test_conditional_bernoulli_equals_enumeration(n: int) -> None:
    """Every k from 0 to n + 1 and random padding, in one batch of rows with their own k."""
    torch.manual_seed(n)
    rows = [(k, trial) for k in range(n + 2) for trial in range(3)]
    scores = 3 * torch.randn(len(rows), n)
    valid = torch.rand(len(rows), n) < torch.tensor([[1.0, 0.7, 0.4][trial] for _, trial in rows]).unsqueeze(-1)
    law = ConditionalBernoulli(scores, torch.tensor([k for k, _ in rows]), valid)
    log_z, marginals, entropy = law.log_z(), law.marginals(), law.entropy()
    for row, (k, _) in enumerate(rows):
        places = valid[row].nonzero().flatten()
        masks, log_p, expected = bernoulli_table(scores[row, places].double(), min(k, len(places)))
        torch.testing.assert_close(log_z[row].double(), expected, atol=1e-5, rtol=1e-6)
        wanted = torch.zeros(n, dtype=torch.float64)
        wanted[places] = (log_p.exp().unsqueeze(-1) * masks).sum(0)
        torch.testing.assert_close(marginals[row].double(), wanted, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(entropy[row].double(), -(log_p.exp() * log_p).sum(), atol=1e-5, rtol=1e-5)
        for mask, log in zip(masks, log_p, strict=True):
            full = torch.zeros(len(rows), n, dtype=torch.bool)
            full[row, places] = mask
            torch.testing.assert_close(law.log_prob(full)[row].double(), log, atol=2e-5, rtol=1e-5)


def test_conditional_bernoulli_gradients_to_second_order() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    k, valid = torch.tensor([2, 4, 3]), torch.ones(3, 7, dtype=torch.bool)
    valid[2, 5] = False

    def law(s: Tensor) -> ConditionalBernoulli:
        return ConditionalBernoulli(s, k, valid, 5)

    mask = law(scores).sample(torch.rand(3, 7))
    torch.testing.assert_close(torch.autograd.grad(law(scores).log_z().sum(), scores)[0], law(scores).marginals())
    for function in (
        lambda s: law(s).log_z(),
        lambda s: law(s).marginals(),
        lambda s: law(s).entropy(),
        lambda s: law(s).log_prob(mask),
    ):
        torch.autograd.gradcheck(function, (scores,))
        torch.autograd.gradgradcheck(function, (scores,))


@pytest.mark.parametrize(("n", "k"), [(64, 9), (196, 98), (1024, 256), (4096, 1024)])
@pytest.mark.parametrize("scale", [0.3, 10.0])
def test_conditional_bernoulli_is_exact_at_size(n: int, k: int, scale: float) -> None:
    """fp32 against a float64 recurrence; the marginals are its gradient."""
    torch.manual_seed(n)
    scores = (scale * torch.randn(n)).requires_grad_()
    law = ConditionalBernoulli(scores.unsqueeze(0), torch.tensor([k]), torch.ones(1, n, dtype=torch.bool), k)
    reference = scores.detach().double().requires_grad_()
    expected = log_z_by_recurrence(reference, k)
    torch.testing.assert_close(law.log_z()[0].double(), expected, rtol=1e-6, atol=1e-3)
    marginals = law.marginals()[0]
    assert abs(marginals.sum().item() - k) < 1e-5 * k
    wanted = torch.autograd.grad(expected, reference)[0]
    torch.testing.assert_close(marginals.double(), wanted, rtol=2e-5, atol=1e-6)
    mask, log_prob = law.draw(torch.rand(1, n))
    assert mask.sum() == k
    assert abs(log_prob.item() - ((reference * mask[0]).sum() - expected).item()) < 1e-3 * max(1, abs(log_prob.item()))
    gradient = torch.autograd.grad((marginals * torch.randn(n)).sum() + law.entropy().sum(), scores)[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("n", "k"), [(6, 3), (5, 2), (6, 5)])
def test_draws_follow_the_law(law: type, n: int, k: int) -> None:
    """Chi-square of 40 000 draws over all subsets: within 4 standard deviations of its mean (fixed seed)."""
    torch.manual_seed(10 * n + k)
    scores, draws = torch.randn(n), 40_000
    sampler = law(scores.expand(draws, n), torch.tensor(k), torch.ones(n, dtype=torch.bool), k)
    mask, _ = sampler.draw(torch.rand(draws, n))
    masks, p = set_probabilities(scores.double(), k, law)
    code = 2 ** torch.arange(n)
    seen = torch.tensor([((mask * code).sum(-1) == (subset * code).sum()).sum() for subset in masks])
    assert seen.sum() == draws
    chi_square = ((seen - draws * p) ** 2 / (draws * p)).sum().item()
    freedom = len(masks) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_draws_have_the_exact_marginals() -> None:
    """A deep tree with odd levels and padding: 40 000 draws, every frequency within 4.5 standard errors."""
    torch.manual_seed(4)
    n, k, draws = 37, 11, 40_000
    valid = torch.arange(n) % 9 != 4
    law = ConditionalBernoulli((2 * torch.randn(n)).expand(draws, n), torch.tensor(k), valid, k)
    mask, marginals = law.sample(torch.rand(draws, n)), law.marginals()[0]
    assert (mask.sum(-1) == k).all() and not mask[:, ~valid].any()
    error = (marginals * (1 - marginals) / draws).sqrt()
    assert ((mask.float().mean(0) - marginals).abs() <= 4.5 * error + 1e-9).all()


def test_plackett_luce_log_prob_equals_the_loop() -> None:
    torch.manual_seed(1)
    scores = torch.randn(5)
    orders, expected = plackett_luce_table(scores.double(), 3)
    assert abs(expected.exp().sum().item() - 1) < 1e-12
    law = PlackettLuce(scores.expand(len(orders), 5), torch.tensor(3), torch.ones(5, dtype=torch.bool), 3)
    torch.testing.assert_close(law.log_prob(torch.tensor(orders)).double(), expected, atol=1e-6, rtol=1e-6)
    p = scores.softmax(-1)
    torch.testing.assert_close(law.entropy()[0], -(p * p.log()).sum())


def test_plackett_luce_gradient_at_low_temperature() -> None:
    """fp32 against autograd through the float64 loop, with scores spread over +-40."""
    torch.manual_seed(2)
    scores = (20 * torch.randn(5)).requires_grad_()
    reference = scores.detach().double().requires_grad_()
    for order, log in zip(*plackett_luce_table(reference, 3), strict=True):
        wanted = torch.autograd.grad(log, reference, retain_graph=True)[0]
        law = PlackettLuce(scores, torch.tensor(3), torch.ones(5, dtype=torch.bool), 4)
        log_prob = law.log_prob(torch.tensor([*order, min(set(range(5)) - set(order))]))  # one place does not count
        torch.testing.assert_close(log_prob.double(), log, atol=1e-5, rtol=1e-6)
        gradient = torch.autograd.grad(log_prob, scores)[0]
        torch.testing.assert_close(gradient.double(), wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("law", LAWS)
def test_rows_without_a_choice(law: type) -> None:
    """k = 0, k = valid, k > valid and no valid position: no choice, log-probability 0, gradient exactly 0."""
    scores = torch.randn(5, 4, requires_grad=True)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    sampler = law(scores, torch.tensor([0, 3, 4, 2, 2]), valid, 4)
    mask, log_prob = sampler.draw(torch.rand(5, 4))
    assert mask[:4].tolist() == [[False] * 4, valid[1].tolist(), valid[2].tolist(), [False] * 4]
    assert mask[4].sum() == 2
    entropy = sampler.entropy()
    assert (log_prob[:4] == 0).all() and (entropy[:4] == 0).all()
    total = log_prob.sum() + entropy.sum()
    if law is ConditionalBernoulli:
        marginals = sampler.marginals()
        assert torch.equal(marginals[:4], mask[:4].float())
        torch.testing.assert_close(sampler.log_z()[:4], (mask * scores).sum(-1)[:4])
        total = total + (marginals**2).sum()
    gradient = torch.autograd.grad(total, scores)[0]
    assert (gradient[:4] == 0).all() and gradient[4].abs().min() > 0


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "scores",
    [
        [1e4, -1e4, 0.0, 5.0, 1e4, -3e3],
        [200.0, 200.0, 200.0, -200.0, -200.0, -200.0],
        [1e9, 1e9, 1e9, 1e9, -1e9, 0.0],
        [0.0] * 6,
        [-1e6, -1e6, -1e6, -1e6, -1e6 - 1, -1e6 + 1],
    ],
)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_extreme_scores_stay_finite(law: type, scores: list[float], k: int) -> None:
    torch.manual_seed(0)
    leaf = torch.tensor(scores, requires_grad=True)
    sampler = law(leaf.expand(50, 6), torch.tensor(k), torch.ones(6, dtype=torch.bool), k)
    mask, log_prob = sampler.draw(torch.rand(50, 6))
    assert (mask.sum(-1) == k).all()
    total = log_prob.sum() + sampler.entropy().sum()
    if law is ConditionalBernoulli:
        marginals = sampler.marginals()
        assert ((marginals >= 0) & (marginals <= 1 + 1e-5)).all()
        _, log_p, _ = bernoulli_table(leaf.detach().double(), k)
        wanted = (log_p.exp().unsqueeze(-1) * subsets(6, k)).sum(0)
        torch.testing.assert_close(marginals[0].double(), wanted, atol=1e-5, rtol=1e-5)
        total = total + (marginals**2).sum()
    assert total.isfinite() and torch.autograd.grad(total, leaf)[0].isfinite().all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_noise_at_the_edges(law: type, edge: float) -> None:
    """Uniform noise of exactly 0 or 1 still keeps exactly k."""
    sampler = law(torch.randn(4, 11), torch.tensor([1, 4, 7, 10]), torch.ones(11, dtype=torch.bool))
    mask, log_prob = sampler.draw(torch.full((4, 11), edge))
    assert mask.sum(-1).tolist() == [1, 4, 7, 10] and log_prob.isfinite().all()
    assert gumbel_noise(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("law", LAWS)
def test_slots_shapes_and_modes_do_not_change_the_law(law: type) -> None:
    """Leading dimensions, a loose or tight ``slots``, no_grad and autocast give the same numbers."""
    torch.manual_seed(3)
    scores, uniform = torch.randn(2, 3, 1, 13), torch.rand(2, 3, 1, 13)
    k = torch.randint(0, 7, (2, 3, 1))
    valid = torch.rand(2, 1, 1, 13) < 0.8
    mask, log_prob = law(scores, k, valid, 6).draw(uniform)
    assert mask.shape == scores.shape and log_prob.shape == k.shape
    assert torch.equal(mask.sum(-1), torch.minimum(k, valid.sum(-1).expand_as(k)))
    for slots in (None, 13, 50):
        other, other_log = law(scores, k, valid, slots).draw(uniform)
        assert torch.equal(mask, other)
        torch.testing.assert_close(log_prob, other_log, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        other, other_log = law(scores, k, valid, 6).draw(uniform)
        entropy = law(scores, k, valid, 6).entropy()
    assert torch.equal(mask, other) and torch.equal(log_prob, other_log)
    assert torch.equal(entropy, law(scores, k, valid, 6).entropy())
    one, one_log = law(scores[1, 2, 0], k[1, 2, 0], valid[1, 0, 0], 6).draw(uniform[1, 2, 0])
    assert torch.equal(one, mask[1, 2, 0])
    torch.testing.assert_close(one_log, log_prob[1, 2, 0])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_exploration_draws_from_the_mixture_and_knows_it(law: type, rate: float) -> None:
    """Against enumeration, for orders and for sets: 40 000 draws follow ``(1 - rate) p + rate uniform``, and that is the
    log-probability they come with."""
    torch.manual_seed(6)
    n, k, draws = 5, 2, 40_000
    scores = 2 * torch.randn(n)
    sampler = law(scores.expand(draws, n), torch.tensor(k), torch.ones(n, dtype=torch.bool), k)
    mask, log_prob = sampler.explore(torch.rand, rate)
    masks, p = set_probabilities(scores.double(), k, law)
    p = (1 - rate) * p + rate / len(masks)
    code = 2 ** torch.arange(n)
    which = (mask * code).sum(-1, keepdim=True) == (masks * code).sum(-1)
    assert (which.sum(-1) == 1).all()
    chi_square = ((which.sum(0) - draws * p) ** 2 / (draws * p)).sum().item()
    freedom = len(masks) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    if law is ConditionalBernoulli:
        known = p.unsqueeze(0).expand(draws, -1)[which].unsqueeze(-1)
    else:  # a set has two orders; each row was drawn in one of them
        orders, logs = plackett_luce_table(scores.double(), k)
        logs = ((1 - rate) * logs.exp() + rate / len(orders)).log()
        both = [[log for order, log in zip(orders, logs, strict=True) if subset[list(order)].all()] for subset in masks]
        known = torch.tensor(both).exp()[which.int().argmax(-1)]
        # E[1 / p(order)] counts the orders
        inverse = (-log_prob.double()).exp()
        assert abs(inverse.mean() - len(orders)) < 4.5 * inverse.std() / math.sqrt(draws) + 1e-4
    assert ((log_prob.double().exp().unsqueeze(-1) / known).log().abs().amin(-1) < 1e-5).all()


@pytest.mark.parametrize("law", LAWS)
def test_exploration_without_a_choice_or_at_the_extremes(law: type) -> None:
    """Rows without a choice have log-probability 0 and no gradient; what a sure law never draws stays finite; 0 is ``draw``."""
    scores = torch.tensor([1e4, -1e4, 0.0, 5.0]).repeat(50, 1).requires_grad_()
    k = torch.arange(5).repeat(10)
    sampler = law(scores, k, torch.ones(4, dtype=torch.bool), 4)
    for rate in (0.5, 1.0):
        mask, log_prob = sampler.explore(torch.rand, rate)
        assert torch.equal(mask.sum(-1), k) and log_prob.isfinite().all() and (log_prob <= 0).all()
        assert (log_prob[(k == 0) | (k == 4)] == 0).all()
        if rate < 1:
            gradient = torch.autograd.grad(log_prob.sum(), scores, retain_graph=True)[0]
            assert gradient.isfinite().all() and (gradient[(k == 0) | (k == 4)] == 0).all()
    torch.manual_seed(0)
    one = sampler.explore(torch.rand, 0.0)
    torch.manual_seed(0)
    other = sampler.draw(torch.rand(50, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_one_position_equals_the_tree() -> None:
    """With ``slots=1`` the law is a softmax: all results, to second order, and what is drawn; rows without a choice among them."""
    torch.manual_seed(0)
    scores, valid = 3 * torch.randn(60, 9, dtype=torch.float64), torch.rand(60, 9) < 0.7
    k = torch.randint(0, 2, (60,))
    valid[:4] = torch.arange(9) < torch.tensor([0, 1, 0, 1]).unsqueeze(-1)
    weight = torch.randn(60, 9, dtype=torch.float64)

    def results(slots: int) -> tuple[ConditionalBernoulli, list[Tensor]]:
        given = scores.clone().requires_grad_()
        law = ConditionalBernoulli(given, k, valid, slots)
        marginals = law.marginals()
        values = [law.log_z(), marginals, law.entropy(), law.log_prob(marginals.detach()), law.uniform_log_prob()]
        first = [torch.autograd.grad(v.pow(2).sum(), given, create_graph=True)[0] for v in values[:4]]
        second = [torch.autograd.grad((g * weight).sum(), given, retain_graph=True)[0] for g in first]
        return law, [*values, *first, *second]

    (law, found), (tree_law, wanted) = results(1), results(2)
    assert type(law) is Categorical and type(tree_law) is ConditionalBernoulli
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    drawn = torch.stack([law.sample(torch.rand(60, 9)) for _ in range(4000)]).double()
    assert torch.equal(drawn.sum(-1), torch.minimum(k, valid.sum(-1)).expand(4000, -1).double())
    assert (drawn.mean(0) - found[1]).abs().max() < 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("short", [0, polynomials.SHORT])  # all products as Toeplitz matrices; power by power
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_polynomial_tree_equals_a_loop(n: int, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root's coefficient, its derivative, and the exact split, against multiplying out one factor at a time."""
    monkeypatch.setattr(polynomials, "SHORT", short)
    torch.manual_seed(n)
    leaves = torch.rand(2, n, dtype=torch.float64, requires_grad=True)
    product = [torch.ones((), dtype=torch.float64)]
    for off, on in leaves.unbind(1):
        product = [
            (product[c] * off if c < len(product) else 0) + (product[c - 1] * on if c else 0)
            for c in range(len(product) + 1)
        ]
    for count in range(n + 1):
        levels = tree(leaves, max(count, 1))
        wanted = torch.autograd.grad(product[count], leaves, retain_graph=True)[0]
        torch.testing.assert_close(outside(levels, torch.tensor(count))[:, :n], wanted)
        split = descend(levels, torch.tensor(count), torch.rand(n))
        assert split.shape == (n,) and split.sum() == count and set(split.tolist()) <= {0, 1}
