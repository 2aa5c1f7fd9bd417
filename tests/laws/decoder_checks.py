"""The claims of ``family_checks.py`` for decoders, which select from a prompt and then write: for the table in the documentation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from decoders import DECODERS, SIZES, WINDOW, harden, kept, prompts, stock, write, written_by_oracle
from family_checks import plain_flex
from rounding import SOME, assert_rounded

import hf_hardattn


@dataclass(frozen=True)
class PromptSubject:
    """One site of one decoder."""

    family: str
    site: str

    @property
    def head(self) -> str:
        return f"{DECODERS[self.family]}ForCausalLM"

    @property
    def kind(self) -> str:
        return self.site.split(".")[1]

    def hard(self, budget: Any = 0.5, **options: Any) -> Any:
        """The tiny model with the site in place."""
        return harden(stock(self.family), {"sites": [self.site], "budget": budget, "scorer": "linear", **options})


def subjects() -> list[PromptSubject]:
    """Every decoder with every kind of site."""
    return [
        PromptSubject(family, f"decoder.{site}") for family in DECODERS for site in ("inputs", "tokens.0", "self.1")
    ]


def equals_stock(subject: PromptSubject) -> None:
    """A site that keeps everything changes nothing."""
    assert torch.equal(write(subject.hard(1.0), prompts()).sequences, write(stock(subject.family), prompts()).sequences)


def equals_oracle(subject: PromptSubject) -> None:
    """What is written is what the stock model writes, without a cache, when masks hide what was dropped."""
    model = subject.hard()
    with hf_hardattn.record(model) as recording:
        found = write(model, prompts())
    window = WINDOW if subject.family == "mistral" else None
    text, logits = written_by_oracle(stock(subject.family), prompts(), kept(recording), window)
    assert torch.equal(found.sequences, text)
    end = SIZES["eos_token_id"]  # min_new_tokens forbids it
    assert_rounded(torch.stack(found.logits, 1)[..., end + 1 :], logits[..., end + 1 :], SOME)


def rows_alone(subject: PromptSubject) -> None:
    """A row of a padded batch is written on as it is alone, without padding."""
    model, batch = subject.hard(), prompts()
    together = write(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(-1)):
        alone = write(model, {key: value[row : row + 1, -length:] for key, value in batch.items()})
        assert torch.equal(alone.sequences[0], together.sequences[row, -alone.sequences.shape[1] :])


def gates_reach_attention(subject: PromptSubject) -> None:
    """In training the choice weighs the attention, so that the scorer gets a gradient."""
    model, batch = subject.hard(estimator="straight_through").train(), prompts()
    labels = batch["input_ids"].clone()
    labels[:, :9] = -100
    model(**batch, labels=labels).loss.backward()
    gradients = [p.grad for s in hf_hardattn.selectors(model).values() for p in s.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 1e-7 for g in gradients)


def reloads(subject: PromptSubject) -> None:
    """Saved and loaded again, it writes the same."""
    model = subject.hard()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
        assert torch.equal(write(again, prompts()).sequences, write(model, prompts()).sequences)


def certified(subject: PromptSubject) -> None:
    """What an ``inputs`` site dropped cannot change the output, bit for bit."""
    report = hf_hardattn.verify(subject.hard(), prompts())
    assert report.parity_ok and all(site.certified for site in report.sites), str(report)


def cache_changes_nothing(subject: PromptSubject) -> None:
    """Dynamic and static caches write the same; without a cache, ``generate`` is refused."""
    model = subject.hard()
    expected = write(model, prompts(), num_beams=3).sequences
    assert torch.equal(write(model, prompts(), num_beams=3, cache_implementation="static").sequences, expected)


def compiles(subject: PromptSubject) -> None:
    """Reading the prompt is one graph."""
    model = subject.hard()
    with torch.no_grad():
        expected = model(**prompts()).logits
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        assert_rounded(compiled(**prompts()).logits, expected, SOME)


def flex_attends(subject: PromptSubject) -> None:
    """Flex attention gives what SDPA gives."""
    model = subject.hard()
    expected = write(model, prompts())
    model.set_attn_implementation("flex_attention")
    with plain_flex():
        assert torch.equal(write(model, prompts()).sequences, expected.sequences)


CHECKS: dict[str, Callable[[PromptSubject], None]] = {
    check.__name__: check
    for check in (
        equals_stock,
        equals_oracle,
        rows_alone,
        gates_reach_attention,
        reloads,
        certified,
        cache_changes_nothing,
    )
}
SLOW: dict[str, Callable[[PromptSubject], None]] = {check.__name__: check for check in (compiles, flex_attends)}
