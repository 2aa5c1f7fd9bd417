"""The claims of ``family_checks.py`` for decoders, which select from a prompt and then write: for the table in the documentation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import vision_language
from decoders import DECODERS, SIZES, WINDOW, harden, kept, prompts, stock, write, written_by_oracle
from rounding import SOME, assert_rounded

import hf_hardattn


@dataclass(frozen=True)
class PromptSubject:
    """One site of one decoder."""

    family: str
    site: str

    @property
    def head(self) -> str:
        return type(self.stock()).__name__

    @property
    def kind(self) -> str:
        return self.site.split(".")[1]

    def stock(self) -> Any:
        """The tiny model."""
        return stock(self.family)

    def batch(self) -> dict[str, Any]:
        """Two prompts, the second padded on the left."""
        return prompts()

    def hard(self, budget: Any = 0.5, **options: Any) -> Any:
        """The model with the site in place."""
        return harden(self.stock(), {"sites": [self.site], "budget": budget, "scorer": "linear", **options})

    def written_by_oracle(self, chosen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The text that the oracle writes, its logits, and from which token on they count."""
        window = WINDOW if self.family == "mistral" else None
        text, logits = written_by_oracle(self.stock(), self.batch(), chosen, window)
        return text, logits, SIZES["eos_token_id"] + 1  # min_new_tokens forbids it


class ImageSubject(PromptSubject):
    """One site of one vision–language model, which chooses among the rows of an image."""

    def stock(self) -> Any:
        return vision_language.stock(self.family)[0]

    def batch(self) -> dict[str, Any]:
        return vision_language.stock(self.family)[1]

    def written_by_oracle(self, chosen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
        text, logits = vision_language.written_by_oracle(self.family, self.batch(), chosen)
        return text, logits[..., : vision_language.IMAGE], SIZES["eos_token_id"] + 1


def subjects() -> list[PromptSubject]:
    """Every decoder, and every vision–language model, with every kind of site."""
    sites = ("inputs", "tokens.0", "self.1")
    return [
        *(PromptSubject(family, f"decoder.{site}") for family in DECODERS for site in sites),
        *(ImageSubject(family, f"decoder.{site}") for family in vision_language.BUILDERS for site in sites),
    ]


def applies(name: str, subject: PromptSubject) -> bool:
    """Whether a claim concerns a site: of the rows of an image nothing can be replaced, as another tower makes them."""
    return name != "certified" or (subject.kind == "inputs" and not isinstance(subject, ImageSubject))


def equals_stock(subject: PromptSubject) -> None:
    """A site that keeps everything changes nothing."""
    batch = subject.batch()
    assert torch.equal(write(subject.hard(1.0), batch).sequences, write(subject.stock(), batch).sequences)


def equals_oracle(subject: PromptSubject) -> None:
    """What is written is what the stock model writes, without a cache, when masks hide what was dropped."""
    model = subject.hard()
    with hf_hardattn.record(model) as recording:
        found = write(model, subject.batch())
    text, logits, first = subject.written_by_oracle(kept(recording))
    assert torch.equal(found.sequences, text)
    assert_rounded(torch.stack(found.logits, 1)[..., first : logits.shape[-1]], logits[..., first:], SOME)


def rows_alone(subject: PromptSubject) -> None:
    """A row of a padded batch is written on as it is alone, without padding."""
    model, batch = subject.hard(), subject.batch()
    together = write(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(-1)):
        alone = write(model, {key: one_row(key, value, row, int(length)) for key, value in batch.items()})
        assert torch.equal(alone.sequences[0], together.sequences[row, -alone.sequences.shape[1] :])


def one_row(name: str, value: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """The part of an input that is one of two rows', without padding on the left."""
    if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        return value[row : row + 1, -length:]
    return value.chunk(2)[row]  # images, which stand one behind the other


def gates_reach_attention(subject: PromptSubject) -> None:
    """In training the choice weighs the attention, so that the scorer gets a gradient."""
    model, batch = subject.hard(estimator="straight_through").train(), subject.batch()
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
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
        assert torch.equal(write(again, subject.batch()).sequences, write(model, subject.batch()).sequences)


def certified(subject: PromptSubject) -> None:
    """What an ``inputs`` site dropped cannot change the output, bit for bit."""
    report = hf_hardattn.verify(subject.hard(), subject.batch())
    assert report.parity_ok and all(site.certified for site in report.sites), str(report)


def cache_changes_nothing(subject: PromptSubject) -> None:
    """Dynamic and static caches write the same; without a cache, ``generate`` is refused."""
    model, batch = subject.hard(), subject.batch()
    expected = write(model, batch, num_beams=3).sequences
    assert torch.equal(write(model, batch, num_beams=3, cache_implementation="static").sequences, expected)


def compiles(subject: PromptSubject) -> None:
    """Reading the prompt is one graph."""
    model, batch = subject.hard(), subject.batch()
    with torch.no_grad():
        expected = model(**batch).logits
        torch._dynamo.reset()
        if isinstance(subject, ImageSubject):
            try:
                torch.compile(subject.stock(), fullgraph=True, backend="eager")(**batch)
            except Exception as error:
                raise NotImplementedError("the stock model fails as well") from error
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        assert_rounded(compiled(**batch).logits, expected, SOME)


def flex_attends(subject: PromptSubject) -> None:
    """Flex attention gives what SDPA gives."""
    model = subject.hard()
    expected = write(model, subject.batch())
    try:
        subject.stock().set_attn_implementation("flex_attention")
    except ValueError as error:
        reason = str(error).partition(". ")[0]
        raise NotImplementedError(f"the stock model fails as well ({reason})") from error
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(write(model, subject.batch()).sequences, expected.sequences)


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
