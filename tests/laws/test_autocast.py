"""Law 16: scores, noise and log-probabilities are fp32 under autocast too."""

from __future__ import annotations

import pytest
import torch
from cases import ESTIMATORS, SCORERS, cases, hard, run, train_loss

import hf_hardattn
from hf_hardattn.modeling import choosing

DTYPES = (torch.bfloat16, torch.float16)
# their scores are whole numbers, or the logits that the attention computed
COARSE = ("first", "attention")
# every scorer where it is served, and every estimator
CASES = [
    *cases(SCORERS, ("reinforce", "gumbel"), (2,)),
    *cases(
        ("linear",), [name for name in ESTIMATORS if name != "soft"], (2,), lambda place: place.architecture == "t5"
    ),
]


@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[n % 2]) for n, case in enumerate(CASES)], ids=str)
def test_what_a_choice_is_made_of_is_fp32(case, dtype, monkeypatch):
    drawn = []
    uniform = choosing.uniform
    monkeypatch.setattr(choosing, "uniform", lambda *args: (drawn.append(uniform(*args)), drawn[-1])[1])
    example = hard(case, temperature=0.7, entropy_weight=0.1)
    with torch.autocast("cpu", dtype), hf_hardattn.record(example.model) as selections:
        run(example)
        loss = train_loss(example)
    loss.backward()
    assert loss.isfinite() and selections
    for selection in selections:
        known = (selection.scores, selection.gates, selection.own.log_prob, selection.own.entropy, selection.penalty)
        assert {value.dtype for value in known if value is not None} == {torch.float32}
    assert {noise.dtype for noise in drawn} <= {torch.float32}
    for selector in hf_hardattn.selectors(example.model).values():
        for name, parameter in selector.named_parameters():
            assert (
                parameter.grad is None or parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
            ), name


FAMILIES = ("vit", "t5", "bert")
SCORED = [
    case
    for case in cases(budgets=(2,), where=lambda place: place.architecture in FAMILIES)
    if case.scorer not in COARSE
]


@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[n % 2]) for n, case in enumerate(SCORED)], ids=str)
def test_scores_do_not_go_through_half_precision(case, dtype):
    """Not fp32 in name alone: scores that were rounded on the way tie, and ties go to the lower index."""
    example = hard(case)
    with torch.autocast("cpu", dtype), hf_hardattn.record(example.model) as selections:
        run(example)
    scores = torch.cat([s.scores[s.valid.expand_as(s.scores)] for s in selections])
    assert not torch.equal(scores, scores.to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_stays_on_behind_a_choice(dtype):
    """The selector leaves autocast for itself alone: the layers behind it compute in half precision, as stock's do."""
    from cases import PLACES, Case

    place = next(place for place in PLACES if place.architecture == "vit" and place.kind == "tokens")
    example, seen = hard(Case(place, "ViTForImageClassification")), []
    last = example.model.vit.layers[-1].mlp.fc1
    last.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype):
        run(example)
    assert seen == [dtype]
