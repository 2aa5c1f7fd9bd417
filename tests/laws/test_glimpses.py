"""Choices made in several glimpses: the naive loop, the law's log-probability, stopping early."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_rounded

import hf_hardattn
from hf_hardattn import HardAttentionConfig, HardAttentionError, registry
from hf_hardattn.estimators import Sampling
from hf_hardattn.modeling.glimpses import look

Recurrent = registry.load("scorers", "recurrent")
VIT = dict(sites=["vision.inputs"], scorer="recurrent", budget=4)


def scorer(seed: int = 0, std: float = 0.8, **options):
    torch.manual_seed(seed)
    made = Recurrent(7, 7, size=5, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return made


def noise(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)


def choose(made, states, k, valid=None, estimator="reinforce", sampling=None, **options):
    features = made.keys(states, torch.arange(states.shape[1]).expand(states.shape[:2]))
    candidates = torch.ones(len(states), 1, 1, states.shape[1], dtype=torch.bool) if valid is None else valid
    chooser = registry.load("estimators", estimator)(**options)
    counts = torch.full((len(states), 1, 1), k)
    return look(
        made, chooser, features, counts, candidates, slots=min(k, states.shape[1]), sampling=sampling, halts=made.halts
    )


def naive(made, states, k, valid):
    """One row, one look after the other: sort, take, and let the state see it. Returns the positions by look."""
    features = made.keys(states[None], torch.arange(len(states))[None])
    state, taken, looks = made.start(features), [], min(made.glimpses, k)
    for turn in range(looks):
        if turn and made.halts and made.go_on(state).item() <= 0:
            break
        count = math.ceil(k * (turn + 1) / looks) - math.ceil(k * turn / looks)
        scores = made.look(features, state)[0, 0, 0].tolist()
        free = [n for n in range(len(states)) if valid[n] and all(n not in glimpse for glimpse in taken)]
        if made.monotonic and any(taken):
            last = max(n for n in taken[-1]) if taken[-1] else -1
            free = [n for n in free if all(n > max(glimpse, default=-1) for glimpse in taken) and n > last]
        glimpse = sorted(free, key=lambda n: (-scores[n], n))[:count]
        taken.append(glimpse)
        seen = features[0, 0, glimpse].mean(0) if glimpse else torch.zeros(made.size)
        state = made.see(state, seen[None, None])
    return taken


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    glimpses=st.integers(1, 5),
    monotonic=st.booleans(),
    halting=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_looks_are_the_naive_ones(n, k, glimpses, monotonic, halting, seed):
    made = scorer(seed, glimpses=glimpses, monotonic=monotonic, halting_cost=0.1 if halting else None)
    states = torch.randn(2, n, 7, generator=torch.Generator().manual_seed(seed))
    valid = torch.rand(2, 1, 1, n, generator=torch.Generator().manual_seed(seed)) < 0.8
    with torch.no_grad():
        choice, scores = choose(made, states, min(k, n), valid)
        for row in range(2):
            taken = naive(made, states[row], min(k, n), valid[row, 0, 0].tolist())
            kept = sorted(position for glimpse in taken for position in glimpse)
            assert choice.mask[row, 0, 0].nonzero().flatten().tolist() == kept
            ranks = scores[row, 0, 0]
            for earlier, later in zip(taken, taken[1:], strict=False):  # seen earlier ranks higher
                if earlier and later:
                    assert ranks[earlier].min() > ranks[later].max()
            dropped = [p for p in range(n) if p not in kept and valid[row, 0, 0, p]]
            if kept and dropped:
                assert ranks[kept].min() > ranks[dropped].max()


@pytest.mark.parametrize("halting_cost", [None, 0.0])
@pytest.mark.parametrize("law", ["plackett_luce", "conditional_bernoulli"])
def test_the_log_probability_is_that_of_the_whole_sequence(law, halting_cost):
    """Every outcome's probability, read off many draws: they are right when each matches its frequency and all sum to one."""
    made = scorer(3, 0.4, glimpses=2, halting_cost=halting_cost)
    states = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(1)).expand(40_000, -1, -1)
    with torch.no_grad():
        choice, scores = choose(made, states, 2, sampling=Sampling(noise()), law=law)
    order = torch.where(choice.mask, scores, -torch.inf)[:, 0, 0].argsort(descending=True)[:, :2]
    order[:, 1] = torch.where(choice.mask.sum(-1)[:, 0, 0] > 1, order[:, 1], -1)  # stopped after one look
    told = choice.log_prob.flatten().exp()
    total = 0.0
    for outcome in order.unique(dim=0):
        rows = (order == outcome).all(1)
        probability, frequency = told[rows][0].item(), rows.float().mean().item()
        assert told[rows].max() - told[rows].min() < 1e-5
        assert abs(probability - frequency) < 4.5 * math.sqrt(frequency / len(order)) + 1e-4
        total += probability
    assert abs(total - 1) < 0.01 and len(order.unique(dim=0)) == (12 if halting_cost is None else 16)


@pytest.mark.parametrize("halting_cost", [None, 0.3])
def test_the_score_function_is_unbiased(halting_cost):
    made = scorer(5, 0.4, glimpses=2, halting_cost=halting_cost)
    states = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(2))
    value = torch.tensor([0.3, -1.0, 2.0, 0.5])
    parameters = list(made.parameters())

    def probability(first: int, second: int | None) -> torch.Tensor:
        features = made.keys(states, torch.arange(4)[None])
        state = made.start(features)
        chance = made.look(features, state)[0, 0, 0].softmax(0)[first]
        state = made.see(state, features[:, :, first])
        go_on = made.go_on(state).sigmoid().squeeze() if made.halts else torch.ones(())
        if second is None:
            return chance * (1 - go_on)
        left = made.look(features, state)[0, 0, 0].masked_fill(torch.arange(4) == first, -torch.inf)
        return chance * go_on * left.softmax(0)[second]

    def reward(*kept: int) -> float:
        return float(value[list(kept)].sum().square())

    expected = sum(probability(a, b) * reward(a, b) for a in range(4) for b in range(4) if a != b)
    if made.halts:
        expected = expected + sum(probability(a, None) * reward(a) for a in range(4))
    exact = torch.autograd.grad(expected, parameters, allow_unused=True)
    choice, _ = choose(made, states.expand(60_000, -1, -1), 2, sampling=Sampling(noise(7)))
    rewards = (choice.mask[:, 0, 0] * value).sum(-1).square()
    found = torch.autograd.grad(
        ((rewards - rewards.mean()) * choice.log_prob.flatten()).mean(), parameters, allow_unused=True
    )
    for name, a, b in zip(dict(made.named_parameters()), exact, found, strict=True):
        if a is not None:
            assert (a - b).abs().max() < 0.05 * max(1.0, a.abs().max()), name


def test_gates_are_the_choice_and_their_gradient_reaches_every_parameter():
    made = scorer(1, glimpses=3, halting_cost=0.2)
    states = torch.randn(3, 8, 7)
    choice, _ = choose(made, states, 6, estimator="simple", sampling=Sampling(noise(3)))
    alive = choice.gates.detach() > 0.5
    assert torch.equal(alive, choice.mask) and choice.mask.sum(-1).max() <= 6
    (choice.gates * torch.randn(8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_an_adaptive_temperature_follows_the_scores_of_each_look():
    """Not those of the first look: a later one that is far surer would lose its gradient."""
    asked, states = [], torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(1))

    class Spy(registry.load("estimators", "simple")):
        def choose(self, scores, k, valid, *, slots, sampling):
            free = [scores[b, 0, 0][valid[b, 0, 0]].std(unbiased=False) for b in range(2)]
            asked.append((sampling.backward_temperature.flatten(), torch.stack(free)))
            return super().choose(scores, k, valid, slots=slots, sampling=sampling)

    made = scorer(std=2.0, glimpses=3)
    features = made.keys(states, torch.arange(6).expand(2, 6))
    everywhere = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    sampling = Sampling(noise(), temperature=0.01)
    look(
        made,
        Spy(),
        features,
        torch.full((2, 1, 1), 3),
        everywhere,
        slots=3,
        sampling=sampling,
        halts=False,
        adaptive=True,
    )
    assert len(asked) == 3 and not torch.allclose(asked[0][0], asked[2][0])
    for found, expected in asked:
        assert_rounded(found, expected.detach().clamp(min=0.01))


def test_the_fee_is_the_expected_share_of_looks():
    made = scorer(2, glimpses=4, halting_cost=2.0)
    with torch.no_grad():
        made.halt_weight.zero_()
        made.halt_bias.fill_(math.log(0.5 / 0.5))
    choice, _ = choose(made, torch.randn(1, 9, 7), 8, sampling=Sampling(noise()))
    assert choice.penalty.item() == pytest.approx(2.0 * (0.5 + 0.25 + 0.125) / 4)


def small_vit(**config):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, image_size=16)
    model = ViTForImageClassification(ViTConfig(**sizes, patch_size=4, num_labels=3)).eval()
    hf_hardattn.apply(model, {**VIT, **config})
    for parameter in next(iter(hf_hardattn.selectors(model).values())).scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return model


def test_a_model_that_stops_early_computes_on_less():
    model = small_vit(scorer_options={"glimpses": 4, "halting_cost": 0.1}, budget=8)
    pixels = torch.randn(6, 3, 16, 16)
    scorer = hf_hardattn.selectors(model)["vision.inputs"].scorer
    lengths = []
    model.vit.layers[1].register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    for bias, longest in ((-50.0, 1 + 2), (50.0, 1 + 8)):
        with torch.no_grad():
            scorer.halt_bias.fill_(bias)
            model(pixels)
        assert lengths.pop() == longest
    with torch.no_grad():
        scorer.halt_bias.zero_()
        with hf_hardattn.record(model) as selections:
            logits = model(pixels).logits
        kept = selections[0].mask.sum(-1).flatten()
        assert kept.unique().numel() > 1  # some stop, some go on
        with hf_hardattn.execution(model, "masked"):
            assert_rounded(model(pixels).logits, logits)


def test_budget_one_keeps_all_even_if_it_could_stop():
    model = small_vit(scorer_options={"glimpses": 3, "halting_cost": 0.1}, budget=1.0)
    with torch.no_grad():
        hf_hardattn.selectors(model)["vision.inputs"].scorer.halt_bias.fill_(-50.0)
    with hf_hardattn.record(model) as selections:
        model(torch.randn(2, 3, 16, 16))
    assert selections[0].mask.all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"scorer_options": {"glimpses": 0}},
            r"glimpses=0 is out of range at scorer recurrent .* at least one glimpse",
        ),
        ({"scorer_options": {"halting_cost": -1.0}}, r"halting_cost=-1.0 is out of range .* A loss weight is >= 0"),
    ],
)
def test_options_out_of_range_are_refused(config, message):
    with pytest.raises(HardAttentionError, match=message):
        small_vit(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"estimator": "distil"},
            r"several glimpses at 'the top level'; estimator 'distil' \(needs teacher\) supports only one",
        ),
        ({"estimator": "marginal", "budget": 1}, r"estimator 'marginal' \(needs choices\)"),
        (
            {"estimator": "hard_concrete"},
            r"'hard_concrete' .* does not keep an exact count in training; scorer 'recurrent'",
        ),
        ({"budget": "top_p:0.5"}, r"budget='top_p:0.5' .* divides a fixed count among its glimpses"),
    ],
)
def test_combinations_that_need_the_scores_of_one_look_are_refused(config, message):
    with pytest.raises(HardAttentionError, match=message):
        HardAttentionConfig(scorer="recurrent", **config)


def reader(head: str, **config):
    from cases import harden, stock

    example = stock({"T": "t5", "G": "gru"}[head[0]], head)
    options = {"size": 6, "monotonic": True}
    harden(
        example.model,
        {"sites": ["decoder.cross.0"], "scorer": "query_key", "scorer_options": options, "budget": 1, **config},
    )
    return example


HEADS = ("GruForConditionalGeneration", "T5ForConditionalGeneration")


@pytest.mark.parametrize("estimator", ["reinforce", "simple"])
@pytest.mark.parametrize("head", HEADS)
def test_a_monotonic_query_reads_on(head, estimator):
    example = reader(head, estimator=estimator, budget=2)
    for training in (False, True):
        example.model.train(training)
        with hf_hardattn.record(example.model) as selections:
            example.model(**example.batch)
        made = selections[0]
        for row in range(len(made.mask)):
            first = 0
            for query in range(made.mask.shape[2]):
                kept = made.mask[row, 0, query].nonzero().flatten().tolist()
                valid = made.valid.expand_as(made.mask)[row, 0, query]
                scores = made.scores[row, 0, query].tolist()
                free = [n for n in range(first, len(scores)) if valid[n]]
                assert kept and min(kept) >= first and len(kept) == min(2, len(free))
                if not training:
                    assert kept == sorted(sorted(free, key=lambda n: (-scores[n], n))[:2])
                first = min(kept)


@pytest.mark.parametrize(("beams", "budget"), [(1, 1), (3, 1), (3, 4)])
@pytest.mark.parametrize("head", HEADS)
def test_a_cache_reads_on_from_where_the_step_before_read(head, beams, budget):
    example = reader(head, budget=budget)
    inputs = {name: example.batch[name] for name in ("input_ids", "attention_mask")}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams)
    found = [example.model.generate(**inputs, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


def test_the_monotonic_likelihood_is_the_sum_over_alignments():
    example = reader("GruForConditionalGeneration", estimator="marginal", estimator_options={"monotonic": True})
    batch = {name: value[:1] for name, value in example.batch.items()}
    batch["labels"] = batch["labels"][:, :3]
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :3]
    batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, :5], batch["attention_mask"][:, :5]
    model, n, t = example.model, 5, 3
    with hf_hardattn.record(model) as selections, torch.no_grad():
        model(**batch)
    scores = selections[0].scores[0, 0].double()
    log_y = torch.zeros(t, n, dtype=torch.double)
    for place in range(n):
        forced = (torch.arange(n) == place).expand(1, 1, t, n)
        with hf_hardattn.replay(model, {"decoder.cross.0": forced}), torch.no_grad():
            told = model(**batch).logits.double().log_softmax(-1)[0]
        log_y[:, place] = told[torch.arange(t), batch["labels"][0]]
    total = 0.0
    for a in range(n):
        for b in range(a, n):
            for c in range(b, n):
                chance = scores[0].softmax(-1)[a] * scores[1][a:].softmax(-1)[b - a] * scores[2][b:].softmax(-1)[c - b]
                total = total + chance * (log_y[0, a] + log_y[1, b] + log_y[2, c]).exp()
    model.train()
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(-math.log(total) / t, abs=1e-5)
    loss.backward()
    selector = hf_hardattn.selectors(model)["decoder.cross.0"]
    # a bias moves all scores alike, so that its gradient is 0 but for rounding
    assert max(p.grad.abs().max() for p in selector.scorer.parameters()) > 1e-6


def test_the_monotonic_likelihood_of_a_batch_is_that_of_its_rows():
    example = reader("GruForConditionalGeneration", estimator="marginal", estimator_options={"monotonic": True})
    example.model.train()
    whole, counted, summed = example.model(**example.batch).loss, 0, 0.0
    for row in range(3):
        batch = {name: value[row : row + 1] for name, value in example.batch.items()}
        length, labels = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name][:, :length]
        summed, counted = summed + example.model(**batch).loss.item() * labels, counted + labels
    assert whole.item() == pytest.approx(summed / counted, abs=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"estimator_options": {"monotonic": True, "objective": "expectation"}},
            r"monotonic=True with objective='expectation'",
        ),
    ],
)
def test_monotonic_needs_the_likelihood(config, message):
    with pytest.raises(HardAttentionError, match=message):
        HardAttentionConfig(estimator="marginal", **config)


def test_monotonic_needs_a_source():
    from cases import stock

    model = stock("t5", "T5ForConditionalGeneration").model
    with pytest.raises(HardAttentionError, match=r"monotonic=True at 'decoder.self.0' reads a source in order"):
        hf_hardattn.apply(
            model, {"sites": ["decoder.self.*"], "scorer": "query_key", "scorer_options": {"monotonic": True}}
        )
