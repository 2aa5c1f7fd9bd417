"""Estimators that need more than the scores: further passes, a teacher, the target; and the stabilisers of a training choice."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from cases import harden, stock
from torch.nn import functional

import hf_hardattn
from hf_hardattn import HardAttentionError
from hf_hardattn.estimators import Sampling
from hf_hardattn.estimators.variational import Variational
from hf_hardattn.losses.distillation import attention_at, teach
from hf_hardattn.losses.training_loss import Step
from hf_hardattn.schedules import Schedule


def vit(**config):
    example = stock("vit", "ViTForImageClassification")
    harden(example.model, {"sites": ["vision.inputs"], "scorer": "linear", "budget": 3, **config})
    example.model.train()
    return example


def t5(site, **config):
    example = stock("t5", "T5ForConditionalGeneration")
    harden(example.model, {"sites": [site], "budget": 1, "scorer": "query_key", **config})
    example.model.train()
    return example


def scorer_gradient(model):
    (selector,) = hf_hardattn.selectors(model).values()
    return torch.cat([p.grad.flatten() for p in selector.scorer.parameters()])


# ---------------------------------------------------------------- several passes


@pytest.mark.parametrize("name", ["rloo", "sfess"])
def test_samples_of_a_step_are_scored_against_each_other(name):
    """The loss of K samples is their mean, and its surrogate is the formula, term by term."""
    example = vit(estimator=name, estimator_options={"samples": 3})
    torch.manual_seed(5)
    with hf_hardattn.record(example.model) as selections:
        output = example.model(**example.batch)
    assert len(selections) == 3 and len({s.mask.sum().item() for s in selections}) == 1
    losses = []
    for selection in selections:
        with hf_hardattn.replay(example.model, [selection] * 3):
            logits = example.model(**example.batch).logits
        losses.append(functional.cross_entropy(logits, example.batch["labels"], reduction="none").detach())
    losses = torch.stack(losses)
    expected = losses.mean()
    for row, selection in enumerate(selections):
        others = (losses.sum(0) - losses[row]) / 2
        expected = expected + ((losses[row] - others) * selection.log_prob.sum((1, 2))).mean() / 3
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "samples"), [("rloo", 1), ("sfess", 0)])
def test_one_sample_has_nothing_to_compare_with(name, samples):
    with pytest.raises(HardAttentionError, match=f"samples={samples} is out of range at estimator {name}"):
        hf_hardattn.HardAttentionConfig(estimator=name, estimator_options={"samples": samples})


def test_one_sample_alone_is_scored_against_the_other_examples():
    """A loop of one's own may call auxiliary_loss after a single pass."""
    example = vit(estimator="rloo")
    with hf_hardattn.record(example.model) as selections:
        example.model(**example.batch)
    reward = torch.tensor([1.0, 2.0, 6.0])
    loss = hf_hardattn.auxiliary_loss(selections[:1], hf_hardattn.selectors(example.model), reward)
    advantage = reward - torch.tensor([4.0, 3.5, 1.5])
    torch.testing.assert_close(loss, -(advantage * selections[0].log_prob.sum((1, 2))).mean())


# ---------------------------------------------------------------- the marginal likelihood


def test_marginal_likelihood_of_a_row():
    example = vit(estimator="marginal", budget=2)
    loss = example.model(**example.batch).loss
    subsets = list(itertools.combinations(range(9), 2))
    example.model.eval()
    with hf_hardattn.record(example.model) as selections, torch.no_grad():
        example.model(**example.batch)
    scores = selections[0].scores[:, 0, 0, 1:]
    log_p = torch.stack([scores[:, list(s)].sum(-1) for s in subsets]).log_softmax(0)
    log_y = []
    for subset in subsets:
        mask = torch.tensor([[True] + [n in subset for n in range(9)]]).expand(3, -1)
        with hf_hardattn.replay(example.model, {"vision.inputs": mask}), torch.no_grad():
            logits = example.model(**example.batch).logits
        log_y.append(-functional.cross_entropy(logits, example.batch["labels"], reduction="none"))
    torch.testing.assert_close(loss, -(log_p + torch.stack(log_y)).logsumexp(0).mean(), rtol=1e-4, atol=1e-5)


def test_marginal_likelihood_label_by_label_in_the_last_layer():
    """Each target position has its own choice; the sum over them factorises, and padding of either side counts nowhere."""
    example = t5("decoder.cross.1", estimator="marginal")
    example.batch["labels"][1, -2:] = -100
    loss = example.model(**example.batch).loss
    loss.backward()
    with hf_hardattn.record(example.model) as selections, torch.no_grad():
        example.model(**example.batch)
    selection = selections[0]
    log_p = selection.scores.masked_fill(~selection.valid, -1e30).log_softmax(-1)[:, 0]  # [B, T, N]
    total, count = 0.0, 0
    example.model.eval()
    for row, query in itertools.product(*map(range, example.batch["labels"].shape)):
        label = example.batch["labels"][row, query]
        if label < 0:
            continue
        terms = []
        for n in selection.valid[row, 0, query].nonzero().flatten():
            mask = torch.zeros_like(selection.mask)
            mask[..., n] = True
            with hf_hardattn.replay(example.model, {"decoder.cross.1": mask}), torch.no_grad():
                logits = example.model(**example.batch).logits
            terms.append(log_p[row, query, n] + logits[row, query].log_softmax(-1)[label])
        total, count = total - torch.stack(terms).logsumexp(0), count + 1
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)


def test_marginal_refuses_what_it_cannot_weigh():
    with pytest.raises(HardAttentionError, match="supports this only in the last layer"):
        example = t5("decoder.cross.0", estimator="marginal")
        example.model(**example.batch)
    with pytest.raises(HardAttentionError, match="126 selections of 4 among 9 positions"):
        example = vit(estimator="marginal", estimator_options={"limit": 100}, budget=4)
        example.model(**example.batch)
    with pytest.raises(HardAttentionError, match="tries every selection of ONE site"):
        example = t5("decoder.cross.*", estimator="marginal")
        example.model(**example.batch)
    with pytest.raises(HardAttentionError, match="unknown objective 'sum'"):
        hf_hardattn.HardAttentionConfig(estimator="marginal", estimator_options={"objective": "sum"})


# ---------------------------------------------------------------- variational


def test_variational_divergence_is_exact():
    torch.manual_seed(0)
    prior, posterior = torch.randn(6).double(), torch.randn(6).double()
    subsets = [list(s) for s in itertools.combinations(range(6), 2)]
    p, q = (torch.stack([s[c].sum() for c in subsets]).log_softmax(0) for s in (prior, posterior))
    sampling = Sampling(uniform=torch.rand, posterior=posterior.float())
    choice = Variational().sample(
        prior.float(), torch.tensor(2), torch.ones(6, dtype=torch.bool), slots=2, sampling=sampling
    )
    torch.testing.assert_close(choice.penalty.double(), (q.exp() * (q - p)).sum(), rtol=1e-5, atol=1e-6)


def test_inference_network_reads_the_target_and_starts_at_the_prior():
    example = t5("decoder.cross.1", estimator="variational")
    (selector,) = hf_hardattn.selectors(example.model).values()
    with hf_hardattn.record(example.model) as selections:
        example.model(**example.batch).loss.backward()
    assert "selector.posterior.key_weight" in "".join(example.model.state_dict())
    network = selector.posterior
    assert network.target_weight.grad is not None
    with torch.no_grad():
        network.reset_parameters()
        states = torch.randn(2, 5, network.hidden_size)
        target = torch.randn(2, 3, network.target_size)
        assert (network(network.keys(states), target, 3) == 0).all()
        torch.nn.init.normal_(network.target_weight)
        seen = network(network.keys(states), target, 3)
        assert seen.shape == (2, 1, 3, 5) and network(network.keys(states), target, 1).shape == (2, 1, 1, 5)
        other = target.clone()
        other[:, 2] += 1
        moved = (network(network.keys(states), other, 3) - seen).abs().sum((0, 1, 3)) > 0
        assert moved.tolist() == [False, False, True]  # mix is zero at the start: no neighbours yet
    assert selections[0].penalty.shape == selections[0].mask.shape[:3]


def test_evaluation_needs_no_target():
    example = t5("decoder.cross.1", estimator="variational")
    example.model.eval()
    batch = {name: value for name, value in example.batch.items() if name != "labels"}
    example.model.generate(**batch, max_new_tokens=3)


# ---------------------------------------------------------------- the soft teacher


@pytest.mark.parametrize("site", ["vision.self.1", "vision.tokens.0", "vision.inputs"])
def test_teacher_attention(site):
    """What a site learns from is the soft model's attention: of its layer, or received in the layers that follow."""
    plain = stock("vit", "ViTForImageClassification", attn_implementation="eager")
    with torch.no_grad():
        maps = plain.model(**plain.batch, output_attentions=True).attentions
    expected = {
        "vision.self.1": maps[1].mean((1, 2)),
        "vision.tokens.0": torch.stack(maps[1:]).mean((0, 2, 3)),
        "vision.inputs": torch.stack(maps).mean((0, 2, 3)),
    }[site]
    example = vit(estimator="distil", sites=[site])
    with hf_hardattn.record(example.model) as selections:
        output = example.model(**example.batch)
    step = Step(example.model, (), example.batch)
    before = example.model.config._attn_implementation
    teacher = teach(example.model, step.forward, attention=True)
    assert example.model.config._attn_implementation == before and example.model.training
    paid = attention_at(teacher, selections, selections[0], per_query=False)[:, 0, 0]
    torch.testing.assert_close(paid, expected, rtol=1e-4, atol=1e-5)
    # the loss: cross-entropy of the labels, and the divergence over what may be dropped
    candidates = (selections[0].valid & ~selections[0].protected)[:, 0, 0]
    paid = torch.where(candidates, paid, 0.0)
    paid = paid / paid.sum(-1, keepdim=True)
    scores = selections[0].scores[:, 0, 0].masked_fill(~candidates, -1e30).log_softmax(-1)
    divergence = (torch.xlogy(paid, paid) - paid * scores.masked_fill(~candidates, 0)).sum(-1).mean()
    task = functional.cross_entropy(output.logits, example.batch["labels"])
    torch.testing.assert_close(output.loss, task + divergence, rtol=1e-4, atol=1e-5)


def test_teacher_attention_finds_the_rows_that_earlier_sites_left():
    """A cross site behind a shrunken encoder learns from the attention that its own keys get, wherever they stood."""
    example = stock("t5", "T5ForConditionalGeneration")
    sites = {
        "encoder.tokens.0": {"budget": 4},
        "encoder.self.1": {"estimator": "distil"},
        "decoder.cross.*": {"estimator": "distil"},
    }
    harden(example.model, {"sites": sites, "budget": 2, "estimator": "reinforce", "baseline": "none"})
    example.model.train()
    with hf_hardattn.record(example.model) as selections:
        example.model(**example.batch).loss.backward()
    step = Step(example.model, (), example.batch)
    teacher = teach(example.model, step.forward, attention=True)
    kept = selections["encoder.tokens.0"][0].mask[:, 0, 0]
    for site in ("encoder.self.1", "decoder.cross.0", "decoder.cross.1"):
        selection = selections[site][0]
        assert selection.mask.shape[-1] < kept.shape[-1]
        tower, kind, layer = site.split(".")
        whole = teacher.attention[tower, kind, int(layer)].mean((1, 2))
        found = attention_at(teacher, selections, selection, per_query=False)[:, 0, 0]
        for row, valid in enumerate(selection.valid.expand_as(selection.mask)[:, 0, 0]):
            torch.testing.assert_close(found[row][valid], whole[row][kept[row]])
        scorer = hf_hardattn.selectors(example.model)[site].scorer
        assert scorer.weight.grad.abs().max() > 0


def test_distil_leaves_the_backbone_to_the_task():
    example = vit(estimator="distil", estimator_options={"weight": 50.0})
    example.model(**example.batch).loss.backward()
    first = example.model.vit.embeddings.patch_embeddings.projection.weight.grad.clone()
    example = vit(estimator="distil", estimator_options={"weight": 0.0})
    example.model(**example.batch).loss.backward()
    torch.testing.assert_close(first, example.model.vit.embeddings.patch_embeddings.projection.weight.grad)
    assert not hf_hardattn.selectors(example.model)["vision.inputs"].masked


def test_self_distillation_adds_the_divergence_of_the_predictions():
    example = vit(estimator="straight_through", self_distillation=0.7)
    output = example.model(**example.batch)
    with torch.no_grad(), hf_hardattn.soft(example.model):
        known = example.model(**example.batch).logits.log_softmax(-1)
    hard = output.logits.log_softmax(-1)
    task = functional.cross_entropy(output.logits, example.batch["labels"])
    expected = task + 0.7 * (known.exp() * (known - hard)).sum(-1).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- baselines, exploration, temperatures, recipes


def test_learned_baseline_learns_the_reward():
    example = vit(estimator="reinforce", baseline="learned")
    (selector,) = hf_hardattn.selectors(example.model).values()
    optimizer = torch.optim.AdamW(selector.baseline.parameters(), 1e-2)
    errors = []
    for _ in range(60):
        values = []
        handle = selector.baseline.register_forward_hook(
            lambda module, args, value, kept=values: kept.append((args[0], value))
        )
        optimizer.zero_grad()
        example.model(**example.batch).loss.backward()
        optimizer.step()
        handle.remove()
        reward, value = values[0]
        errors.append((reward - value).square().mean().item())
    assert sum(errors[-10:]) < 0.2 * sum(errors[:10])
    assert any("baseline" in name for name in example.model.state_dict())


def test_exploration_keeps_other_positions_and_the_gradient():
    torch.manual_seed(0)
    example = vit(estimator="simple", estimator_options={"sample": False}, exploration=1.0)
    with hf_hardattn.record(example.model) as explored:
        example.model(**example.batch).loss.backward()
    kept = hf_hardattn.selectors(example.model)["vision.inputs"].estimator.choose(
        explored[0].scores, torch.full((3, 1, 1), 3), explored[0].valid & ~explored[0].protected, slots=3
    )
    assert not torch.equal(explored[0].mask & ~explored[0].protected, kept.mask)
    assert (explored[0].kept_ratio == 1 / 3).all() and scorer_gradient(example.model).abs().max() > 0
    example.model.eval()
    with hf_hardattn.record(example.model) as greedy, torch.no_grad():
        example.model(**example.batch)
    assert torch.equal(greedy[0].mask & ~greedy[0].protected, kept.mask)


def test_soft_rows_look_everywhere():
    example = vit(estimator="simple", soft_rate=1.0)
    with hf_hardattn.record(example.model) as selections:
        soft_loss = example.model(**example.batch).loss
    assert (selections[0].kept_ratio == 1).all()
    with hf_hardattn.soft(example.model):
        torch.testing.assert_close(soft_loss, example.model(**example.batch).loss)
    with pytest.raises(HardAttentionError, match="soft_rate=0.5 at .* computes only the kept positions"):
        hf_hardattn.HardAttentionConfig(estimator="reinforce", soft_rate=0.5)


def test_adaptive_backward_temperature_keeps_a_confident_scorer_learning():
    gradients = {}
    for temperature in (None, "adaptive"):
        example = vit(estimator="straight_through", backward_temperature=temperature)
        (selector,) = hf_hardattn.selectors(example.model).values()
        with torch.no_grad():
            selector.scorer.weight.mul_(1e3)
        example.model(**example.batch).loss.backward()
        gradients[temperature] = scorer_gradient(example.model).abs().max().item()
    assert gradients["adaptive"] > 100 * gradients[None] and gradients["adaptive"] > 1e-5


def test_schedules_by_share_and_in_stages():
    schedule = Schedule.parse({"start": 1.0, "end": 0.0, "steps": 0.5, "delay": 0.1}, "here")
    assert [round(schedule(step, 100), 3) for step in (0, 10, 35, 60, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    stages = Schedule.parse({"start": 1.0, "end": 0.25, "steps": 90, "stages": 3}, "here")
    assert [stages(step) for step in (0, 29, 30, 60, 89, 90)] == [1.0, 1.0, 0.75, 0.5, 0.5, 0.25]
    for wrong in (1.5, 0, True, -0.2):
        with pytest.raises(HardAttentionError, match="of a schedule at 'here'"):
            Schedule.parse({"start": 1.0, "end": 0.0, "steps": wrong}, "here")


def test_a_share_of_the_training_needs_its_length():
    example = vit(estimator="simple", budget={"start": 1.0, "end": 0.25, "steps": 0.5})
    hf_hardattn.set_step(example.model, 3)
    with pytest.raises(
        HardAttentionError, match="is a share of the training, but the length of the training is not known"
    ):
        example.model(**example.batch)
    hf_hardattn.set_step(example.model, 50, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example.model(**example.batch)


def test_recipe_sets_what_stands_at_its_default():
    robust = hf_hardattn.HardAttentionConfig(recipe="robust", budget=0.25, sites={"vision.tokens.3": {"budget": 0.5}})
    assert robust.anneal == 0.4 and robust.budget == 0.25 and robust.backward_temperature == "adaptive"
    assert robust.estimator == "simple" and robust.estimator_options == {"sample": False}
    assert hf_hardattn.HardAttentionConfig.from_dict(robust.to_dict()) == robust and "recipe" not in robust.to_dict()
    assert hf_hardattn.HardAttentionConfig.from_dict({"recipe": "robust", "budget": 0.25}).budget == robust.budget
    assert (
        robust.replace(budget=9, sites=None).budget == 9
    )  # a saved model takes another budget, as load(budget=9) gives it
    mine = hf_hardattn.HardAttentionConfig(recipe="robust", budget=0.25, estimator="gumbel", backward_temperature=0.3)
    assert mine.estimator == "gumbel" and mine.estimator_options == {} and mine.backward_temperature == 0.3
    assert hf_hardattn.HardAttentionConfig(recipe="robust", anneal=0).anneal == 0
    with pytest.raises(HardAttentionError, match="unknown recipe 'robst'.*Did you mean 'robust'"):
        hf_hardattn.HardAttentionConfig(recipe="robst")
