"""Masks that differ between queries, such as windows or several texts in one row, hold under every budget, packing and execution."""

from __future__ import annotations

import pytest
import torch
from cases import Example, close, harden, run, stock
from rounding import MANY, assert_rounded

import hf_hardattn

TEXTS = [
    ("bert", "BertModel"),
    ("distilbert", "DistilBertModel"),
    ("modernbert", "ModernBertModel"),
    ("t5", "T5EncoderModel"),
    ("umt5", "UMT5EncoderModel"),
]
BUDGETS = [(0.5, None), (0.5, True), ("threshold:0.5", None), ("top_p:0.6", None), ("top_p:0.6", False)]
CUT, LENGTH = 5, 11  # two texts in each row


def two_texts(architecture, head, budget, pack):
    """A hard encoder with ``self`` sites on three rows, in each of which two texts may not read each other."""
    example = stock(architecture, head, padded=False)
    tower = "text" if architecture.endswith("bert") else "encoder"
    harden(example.model, {"sites": [f"{tower}.self.*"], "budget": budget, "scorer": "linear", "pack": pack})
    text = torch.arange(LENGTH) >= CUT
    own = (text[:, None] == text).expand(3, 1, -1, -1)
    return Example(example.model, {"input_ids": example.batch["input_ids"], "attention_mask": own})


def alone(example, row):
    """The output of one row of the batch by itself."""
    return example.model(**{name: value[row : row + 1] for name, value in example.batch.items()}).last_hidden_state[0]


@pytest.mark.parametrize(("budget", "pack"), BUDGETS)
@pytest.mark.parametrize(("architecture", "head"), TEXTS)
@torch.no_grad()
def test_texts_in_one_row_do_not_read_each_other(architecture, head, budget, pack):
    """Whatever the first text says, the second reads the same, in a batch and alone, masked and gathered."""
    example = two_texts(architecture, head, budget, pack)
    with hf_hardattn.record(example.model) as recording:
        found = run(example)
    with hf_hardattn.execution(example.model, "masked"):
        close(run(example), found, MANY)
    for row in range(3):
        assert_rounded(alone(example, row), found["last_hidden_state"][row], MANY)
    other = dict(example.batch, input_ids=example.batch["input_ids"].clone())
    other["input_ids"][:, :CUT] = other["input_ids"][:, :CUT] % 40 + 7
    with hf_hardattn.replay(example.model, recording):
        changed = example.model(**other).last_hidden_state
    assert torch.equal(changed[:, CUT:], found["last_hidden_state"][:, CUT:])
    assert not torch.equal(changed[:, :CUT], found["last_hidden_state"][:, :CUT])


@pytest.mark.parametrize(("budget", "pack"), BUDGETS)
@torch.no_grad()
def test_a_sliding_window_holds_when_rows_keep_different_counts(budget, pack):
    example = stock("modernbert", "ModernBertModel", local_attention=4)
    harden(example.model, {"sites": ["text.self.*"], "budget": budget, "scorer": "linear", "pack": pack})
    found = run(example)["last_hidden_state"]
    real = example.batch["attention_mask"].bool()
    with hf_hardattn.execution(example.model, "masked"):
        assert_rounded(run(example)["last_hidden_state"][real], found[real], MANY)
    for row, length in enumerate(real.sum(-1)):
        alone = example.model(input_ids=example.batch["input_ids"][row : row + 1, :length]).last_hidden_state[0]
        assert_rounded(alone, found[row, :length], MANY)


@pytest.mark.parametrize("execution", ["gathered", "masked"])
@torch.no_grad()
def test_a_query_that_may_read_no_kept_key_reads_nothing(execution):
    example = two_texts("bert", "BertModel", 2, None)
    kept = torch.arange(LENGTH).expand(3, -1) < 2  # nothing of the second text
    attended = []
    for layer in example.model.encoder.layer:
        layer.attention.output.dense.register_forward_pre_hook(lambda module, args: attended.append(args[0]))
    with hf_hardattn.execution(example.model, execution):
        with hf_hardattn.replay(example.model, dict.fromkeys(hf_hardattn.selectors(example.model), kept)):
            run(example)
    for values in attended:
        assert not values[:, CUT:].any() and values[:, :CUT].any()
