"""Law 3: with ``inputs`` sites, no dropped token or patch can change the output, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import SCORERS, Example, cases, close, hard, harden, run, stock
from torch import nn
from transformers import BartForConditionalGeneration, BartModel, BartPreTrainedModel

import hf_hardattn
from hf_hardattn import models

CASES = cases(budgets=(1, 3, 0.4, "top_p:0.5"), where=lambda place: place.kind == "inputs")


def assert_same(found, expected):
    """Bit for bit; not the loss of masked image modelling, whose target is the image itself."""
    assert all(
        torch.equal(found[name], expected[name])
        for name in expected
        if name != "loss" or "reconstruction" not in expected
    )


def replaced(example, case, selections, how):
    """The example with what its ``inputs`` site dropped replaced."""
    made = selections[case.place.group][0]
    tower = case.place.group.split(".")[0]
    dropped = (made.valid & ~made.mask)[:, 0, 0].expand(3, -1)
    assert dropped.any()
    architecture = models.load(case.place.architecture)
    batch = architecture.replace_inputs(example.model, example.batch, {tower: dropped}, how, seed=7)
    assert any(not torch.equal(value, example.batch[name]) for name, value in batch.items() if torch.is_tensor(value))
    return Example(example.model, batch)


@pytest.mark.parametrize("mode", ["gathered", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_dropped_cannot_change_the_output(case, mode):
    example = hard(case)
    with hf_hardattn.execution(example.model, mode):
        with hf_hardattn.record(example.model) as selections:
            run(example)
        with hf_hardattn.replay(example.model, selections):
            expected = run(example)
        for how in ("noise", "zero", "swap"):
            with hf_hardattn.replay(example.model, selections):
                found = run(replaced(example, case, selections, how))
            assert_same(found, expected)


@pytest.mark.parametrize("case", CASES[:: len(SCORERS)], ids=str)
def test_later_sites_do_not_break_the_certificate(case):
    example = stock(case.place.architecture, case.head)
    tower = case.place.group.split(".")[0]
    harden(example.model, {"sites": [f"{tower}.*"], "scorer": "mlp", "budget": 0.6})
    with hf_hardattn.record(example.model) as selections:
        run(example)
    with hf_hardattn.replay(example.model, selections):
        expected = run(example)
    with hf_hardattn.replay(example.model, selections):
        found = run(replaced(example, case, selections, "noise"))
    assert_same(found, expected)


@pytest.mark.parametrize("case", CASES[:: len(SCORERS)], ids=str)
def test_the_certificate_fails_when_a_kept_one_is_replaced(case):
    example = hard(case)
    with hf_hardattn.record(example.model) as selections:
        expected = run(example)
    made = selections[case.place.group][0]
    made.mask, made.valid = ~made.mask & made.valid, made.valid
    changed = replaced(example, case, selections, "noise")
    made.mask = ~made.mask & made.valid
    with hf_hardattn.replay(example.model, selections):
        found = run(changed)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


COPYING = [(name, head) for name in models.names() for head in models.load(name).spec.copying_heads]


@pytest.mark.parametrize("budget", [2, 0.4, "top_p:0.5"])
@pytest.mark.parametrize(("architecture", "head"), COPYING)
def test_heads_that_show_the_decoder_the_input_are_certified(architecture, head, budget):
    """What the encoder dropped does not come back through the decoder, in either execution."""
    example = stock(architecture, head)
    harden(example.model, {"sites": ["encoder.inputs"], "budget": budget})
    report = hf_hardattn.verify(example.model, example.batch)
    assert report.parity_ok and all(site.certified for site in report.sites), str(report)


class OwnHead(BartPreTrainedModel):
    """As a user builds one; its signature is strict."""

    def __init__(self, config):
        super().__init__(config)
        self.model, self.head = BartModel(config), nn.Linear(config.d_model, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        return {"logits": self.head(self.model(input_ids, attention_mask).last_hidden_state.mean(1))}


@pytest.mark.parametrize("head", [BartForConditionalGeneration, BartModel, OwnHead])
def test_whatever_stands_around_a_model_that_copies_the_input_is_certified(head):
    """BART's model feeds its decoder the input where nobody else does, under any head."""
    example = stock("bart", "BartModel")
    torch.manual_seed(0)
    model = harden(head(example.model.config).eval(), {"sites": ["encoder.inputs"], "budget": 3})
    report = hf_hardattn.verify(model, {name: example.batch[name] for name in ("input_ids", "attention_mask")})
    assert report.parity_ok and all(site.certified for site in report.sites), str(report)


@pytest.mark.parametrize("head", models.load("t5").spec.copying_heads)
def test_a_copy_of_kept_tokens_alone_is_the_input_without_the_others(head):
    """What the decoder is fed behind a selection, written out by hand; T5's start token is 0."""
    example = stock("t5", head, padded=False)
    harden(example.model, {"sites": ["encoder.inputs"], "budget": 3})
    ids = example.batch["input_ids"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, [2, 5, -1]] = True
    given = torch.zeros_like(ids)  # the start token, until a kept token comes before
    given[:, 3:6], given[:, 6:] = ids[:, 2:3], ids[:, 5:6]
    seen = mask.long()
    seen[:, 2], seen[:, 0] = 0, 1  # the start token is shown once, at its own place
    with hf_hardattn.replay(example.model, {"encoder.inputs": mask}):
        close(run(example), run(example, decoder_input_ids=given, decoder_attention_mask=seen))
