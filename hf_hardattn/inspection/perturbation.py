"""Measure how a model's confidence in its own answer changes when parts of the input are removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..modeling.context import is_soft_now
from ..modeling.heads import REGRESSION, class_scores
from ..models import family_of
from ..modes import evaluating
from ..recording import record, replay, selectors

REMOVALS = ("select", "replace")
NOT_INPUTS = ("labels", "decoder_input_ids", "decoder_attention_mask")


class PerturbationEvaluator:
    """Compute ``p(y^ | part of the input)`` of a model on a batch, where y^ is its own answer to the whole input.

    The answer is the class of a classifier (of several labels, the likeliest), or the text that a model generates greedily. The probability of a text is the geometric
    mean of the probabilities of its tokens. The model runs in evaluation mode, without gradient.

    Args:
        model: a hard or soft model that classifies or generates text; a regression has no answer with a probability.
        batch: keyword inputs; labels in it are ignored.
        removal: ``"select"`` computes on the given part only, through the model's ``inputs`` site: the rest is removed.
            ``"replace"`` greys patches (0, the mean of normalised pixels) and masks tokens. None uses ``select`` if the model
            has an ``inputs`` site in force.
        answer_tokens: largest number of tokens of a generated answer.

    Attributes:
        tower: the tower whose input is perturbed. places: bool ``[B, P]``, positions that can be removed (no CLS, ``</s>``, padding).
        full: ``p(y^ | x)``, fp32 ``[B]``, of the model as it runs. answer: int64 ``[B]`` class, or ``[B, T]`` tokens.
        removal: the one in use.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], removal: str | None = None, answer_tokens: int = 32):
        self.model: Any = model
        self.batch = {name: value for name, value in batch.items() if name not in NOT_INPUTS and value is not None}
        self.tower, self.places, self.protected = choosable(model, self.batch)
        self.family: Any = family_of(model)
        self.site = f"{self.tower}.inputs"
        selector = selectors(model).get(self.site)
        usable = selector is not None and not is_soft_now(selector)
        self.removal = removal or ("select" if usable else "replace")
        if self.removal not in REMOVALS or self.removal == "select" and not usable:
            raise HardAttentionError(
                f"removal={removal!r} is not possible; 'select' needs the site '{self.site}' to be active, 'replace' does not "
                f"({type(model).__name__}). Use removal='replace'."
            )
        with torch.no_grad(), evaluating(model):
            self._ask(answer_tokens)
            self.full = self.probability()

    def __call__(self, keep: Tensor) -> Tensor:
        """Return ``p(y^ | keep)``, fp32 ``[B]``; ``keep``: bool ``[B, P]``, to which CLS or ``</s>`` is added."""
        with torch.no_grad():
            if self.removal == "select":
                kept = keep | self.protected
                if self.goes_on:
                    kept = nn.functional.pad(kept, (0, self.answer.shape[1]), value=True)
                with replay(self.model, {self.site: kept}):
                    return self.probability()
            return self.probability(self.replaced(~keep & self.places))

    @property
    def goes_on(self) -> bool:
        """Whether the answer follows the input in one row."""
        return self.tower == "decoder" and self.model.can_generate()

    def own(self, site: str | None = None) -> Tensor:
        """Return what the model itself keeps at ``site`` (the ``inputs`` site by default), bool ``[B, P]``, among ``places``."""
        with torch.no_grad(), evaluating(self.model), record(self.model) as recording:
            self.model(**self.batch)
        kept = recording.kept(recording[site or self.site][0]).flatten(1, 2).any(1)
        return kept.expand_as(self.places) & self.places

    def replaced(self, dropped: Tensor) -> dict[str, Any]:
        """Return the batch with ``dropped``, bool ``[B, P]``, masked (tokens) or greyed (patches)."""
        if self.tower != "vision":
            mask = self.batch.get("attention_mask", torch.ones_like(dropped, dtype=torch.long))
            return {**self.batch, "attention_mask": mask * (~dropped).to(mask)}
        return self.family.replace_inputs(self.model, self.batch, {self.tower: dropped}, "zero", 0)

    def probability(self, batch: Mapping[str, Any] | None = None) -> Tensor:
        """Return ``p(y^ | batch)``, with gradient if it is enabled; by default for the unchanged batch."""
        batch = self.batch if batch is None else batch
        with evaluating(self.model):
            output = self.model(**(self._answered(batch) if self.goes_on else batch))
        logits = _logits(self.model, output)
        if self.answer.dim() == 1:
            return class_scores(self.model.config, logits).gather(-1, self.answer[:, None])[:, 0]
        logs = logits.float().log_softmax(-1)
        logs = logs[:, -self.steps : -1] if self.tower == "vision" or self.goes_on else logs
        tokens = logs.gather(-1, self.answer[:, :, None])[..., 0] * self.counted
        return (tokens.sum(-1) / self.counted.sum(-1).clamp(min=1)).exp()

    def _ask(self, answer_tokens: int) -> None:
        """Determine the answer; a generated text becomes the decoder's input, so that one forward pass scores it."""
        if not self.model.can_generate():
            refuse_regression(self.model)
            logits = _logits(self.model, self.model(**self.batch))
            if logits.dim() != 2:
                raise HardAttentionError(
                    f"{type(self.model).__name__} returns logits of shape {tuple(logits.shape)}; an evaluator needs one answer per row, [B, classes]."
                )
            self.answer = logits.argmax(-1)
            return
        texts = self.model.generate(
            **self.batch, max_new_tokens=answer_tokens, max_length=None, num_beams=1, do_sample=False
        )
        in_front = self.goes_on or (self.tower == "vision" and "input_ids" in self.batch)
        prompt = self.batch["input_ids"].shape[1] if in_front else 1
        self.steps = texts.shape[1] - prompt + 1
        self.answer = texts[:, prompt:]
        ends = torch.isin(self.answer, torch.tensor(_ends(self.model), device=texts.device))
        self.counted = ((ends.cumsum(-1) - ends.long()) == 0).float()  # up to and including the first end token
        if self.tower == "vision":
            self.batch |= {"input_ids": texts, "attention_mask": torch.ones_like(texts)}
        elif not self.goes_on:
            self.batch["decoder_input_ids"] = texts[:, :-1]

    def _answered(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the prompt followed by the answer; the labels mark the end of the prompt, from which the sites choose."""
        answer = self.answer
        name, rows = "input_ids", answer
        if name not in batch:
            name, rows = "inputs_embeds", self.model.get_input_embeddings()(answer)
        prompt = batch[name]
        mask = batch.get("attention_mask", torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device))
        return {
            **batch,
            name: torch.cat((prompt, rows), 1),
            "attention_mask": torch.cat((mask, torch.ones_like(answer)), 1),
            "labels": torch.cat((torch.full_like(mask, -100), answer), 1),
        }


def choosable(model: nn.Module, batch: Mapping[str, Any]) -> tuple[str, Tensor, Tensor]:
    """Return the tower that reads the input, its positions that can be removed, and those that cannot (CLS, ``</s>``), bool ``[B, P]``.

    Raises:
        HardAttentionError: an unsupported model, or a batch with neither images nor texts.
    """
    family: Any = family_of(model)
    if family is None:
        raise HardAttentionError(f"{type(model).__name__} is not supported by hard attention.")
    found = next(iter(family.input_rows(model, batch).items()), None)
    if found is None:
        raise HardAttentionError(
            f"the batch has neither pixel_values nor a text for the model's encoder; it has: {', '.join(batch)}."
        )
    tower, rows = found
    reads_tokens = not family.towers(model)[tower].reads_images
    mask = batch.get("attention_mask") if reads_tokens else None
    valid = None if mask is None else mask.bool()
    always: Any = family.towers(model)[tower].protected.mask((rows.shape[0], rows.shape[1]), valid, rows.device)
    protected = torch.zeros_like(rows) if always is None else always
    free = rows & ~protected if valid is None else rows & ~protected & valid
    return tower, free, protected


def refuse_regression(model: Any) -> None:
    """Raise for a head that predicts numbers: nothing tells how probable a number is."""
    if getattr(model.config, "problem_type", None) == REGRESSION:
        raise HardAttentionError(
            f"{type(model).__name__} predicts a number (problem_type='regression'), which has no probability; what is measured or explained "
            "is the answer of a classifier or a text. 'hf-hardattn predict' writes the numbers, and record() what is kept."
        )


def _logits(model: Any, output: Any) -> Tensor:
    for name in ("logits", "itm_score"):
        if output.get(name) is not None:
            return output[name]
    raise HardAttentionError(f"{type(model).__name__} gives no answer; an evaluator needs a head with logits.")


def _ends(model: Any) -> list[int]:
    """Return the ids that end a generated text."""
    text = getattr(model.config, "text_config", model.config)
    found: list[int] = []
    for value in (model.generation_config.eos_token_id, text.eos_token_id, getattr(text, "sep_token_id", None)):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found or [-1]
