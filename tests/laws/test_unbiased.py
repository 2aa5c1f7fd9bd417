"""Law 8: unbiased estimators match the exact gradient through a whole model, enumerated over every subset; biased ones say so."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from cases import BASELINES, ESTIMATORS, harden, stock

import hf_hardattn
from hf_hardattn import registry

KEPT, COPIES, STEPS, LIMIT = 2, 96, 24, 4.8  # standard errors; below 1e-3 for all coordinates together


def laws():
    """Every unbiased estimator that draws, with every sampling law it offers, and with every baseline where it takes one."""
    for name in ESTIMATORS:
        estimator = registry.load("estimators", name)
        if estimator.biased or "reward" not in estimator.needs:
            continue
        known = "law" in inspect.signature(estimator).parameters
        variants = [({"law": law}, law) for law in LAWS] if known else [({}, estimator.law)]
        baselines = BASELINES if estimator().samples == 1 else ["none"]
        yield from [(name, *variant, baseline) for variant in variants for baseline in baselines]


def plackett_luce(scores, subset):
    """The probability of a set: the sum over the orders in which it is picked."""
    total = 0.0
    for order in itertools.permutations(subset):
        left, p = list(range(len(scores))), 1.0
        for pick in order:
            p = p * scores[pick].exp() / scores[left].exp().sum()
            left.remove(pick)
        total = total + p
    return total


def conditional_bernoulli(scores, subset):
    """The probability of a set: its weight over the weights of all sets of its size."""
    others = itertools.combinations(range(len(scores)), len(subset))
    return scores[list(subset)].sum().exp() / sum(scores[list(other)].sum().exp() for other in others)


LAWS = {"plackett_luce": plackett_luce, "conditional_bernoulli": conditional_bernoulli}
SITES = ("vision.inputs", "vision.self.1", "vision.tokens.0")


def selector_gradient(model):
    selector = next(iter(hf_hardattn.selectors(model).values()))
    return torch.cat([p.grad.flatten() for p in selector.scorer.parameters()])


def enumerated(site, law, config):
    """A model in training, an image, and the exact gradient of the expected loss over every choice."""
    example = stock("vit", "ViTForImageClassification", image_size=8)
    pixels = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    model = example.model
    harden(model, {"sites": [site], "budget": KEPT, "temperature": 0.8, **config})
    model.train()
    parameters = list(next(iter(hf_hardattn.selectors(model).values())).scorer.parameters())
    subsets = list(itertools.combinations(range(4), KEPT))
    masks = torch.tensor([[True] + [n in s for n in range(4)] for s in subsets])
    batch = {"pixel_values": pixels.expand(len(subsets), -1, -1, -1), "labels": torch.full((len(subsets),), 3)}
    with hf_hardattn.replay(model, {site: masks}), hf_hardattn.record(model) as selections:
        logits = model(pixel_values=batch["pixel_values"]).logits
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").detach()
    scores = selections[0].scores[0, 0, 0, 1:] / 0.8
    expected_loss = sum(LAWS[law](scores, s) * loss for s, loss in zip(subsets, losses, strict=True))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(expected_loss, parameters)])
    return model, pixels, exact


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("name", "options", "law", "baseline"), list(laws()))
def test_the_mean_gradient_is_the_exact_one(name, options, law, baseline, site):
    if baseline != BASELINES[SITES.index(site) % len(BASELINES)] and site != "vision.inputs":
        return
    config = {"estimator": name, "estimator_options": options, "baseline": baseline}
    model, pixels, exact = enumerated(site, law, config)
    torch.manual_seed(0)
    batch = {"pixel_values": pixels.expand(COPIES, -1, -1, -1), "labels": torch.full((COPIES,), 3)}
    found = []
    for _ in range(STEPS + 1):
        model.zero_grad()
        model(**batch).loss.backward()
        found.append(selector_gradient(model))
    samples = torch.stack(found[1:]).double()  # the first step warms a moving average up
    error = (samples.mean(0) - exact).abs() / (
        samples.std(0) / STEPS**0.5 + 1e-5
    )  # a bias shifts all scores: its gradient is zero, up to rounding
    assert error.max() < LIMIT and exact.abs().max() > 0.01


@pytest.mark.parametrize("site", SITES)
def test_marginal_is_the_exact_gradient_at_once(site):
    config = {"estimator": "marginal", "estimator_options": {"objective": "expectation"}}
    model, pixels, exact = enumerated(site, "conditional_bernoulli", config)
    model(pixel_values=pixels, labels=torch.tensor([3])).loss.backward()
    torch.testing.assert_close(selector_gradient(model), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_through_gates_declare_their_bias(name):
    estimator = registry.load("estimators", name)
    if "gates" in estimator.needs:
        assert estimator.biased is (name != "soft")
