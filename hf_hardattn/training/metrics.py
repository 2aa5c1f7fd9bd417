"""Metrics with a common interface. Each maps all predictions and references to numbers by name.

If the Hub is reachable, ``evaluate.load`` loads the module of the metric. Otherwise the library that this module uses is called directly,
with the same settings and the same result. CIDEr and BLEU of captions have no module on the Hub.
"""

from __future__ import annotations

import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from ..errors import missing_extra, unknown

Texts = Sequence[str]
OFFLINE = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")  # environment variables


@cache
def on_hub(name: str) -> Any:
    """Load the module ``name`` of ``evaluate``; None if the Hub cannot be reached or must not be used."""
    if any(os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE") for key in OFFLINE):
        return None
    try:
        return _evaluate().load(name)
    except (
        OSError,
        ImportError,
        ValueError,
    ):  # no network, not in the cache, or a library that the module needs is missing
        return None


def _evaluate() -> Any:
    """Import the library ``evaluate`` even if the folder of the script holds an ``evaluate.py``, which Python would find first."""
    if not hasattr(sys.modules.get("evaluate"), "load"):
        folders = [folder for folder in sys.path if not (Path(folder) / "evaluate.py").is_file()]
        spec = PathFinder.find_spec("evaluate", folders)
        if spec is None or spec.loader is None:
            raise ImportError("the library 'evaluate' is not installed")
        sys.modules["evaluate"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["evaluate"]


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Share of equal entries, in [0, 1]."""
    right = sum(int(p) == int(r) for p, r in zip(predictions, references, strict=True))
    return {"accuracy": right / max(len(predictions), 1)}


def bleu(predictions: Texts, references: Texts) -> dict[str, float]:
    """Corpus BLEU and chrF in [0, 100], computed by sacrebleu (13a tokens, one reference)."""
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_extra("sacrebleu", "metrics", "--metrics bleu") from error
    lists, found = [[reference] for reference in references], {}
    local: dict[str, tuple[str, Any]] = {
        "sacrebleu": ("bleu", sacrebleu.corpus_bleu),
        "chrf": ("chrf", sacrebleu.corpus_chrf),
    }
    for module, (name, corpus) in local.items():
        hub = on_hub(module) if predictions else None
        if hub is not None:
            found[name] = float(hub.compute(predictions=list(predictions), references=lists)["score"])
        else:
            found[name] = float(corpus(list(predictions), [list(references)]).score)
    return found


def rouge(predictions: Texts, references: Texts) -> dict[str, float]:
    """Mean ROUGE-1, -2 and -L F1 in [0, 100], stemmed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_extra("rouge-score", "metrics", "--metrics rouge") from error
    names = ("rouge1", "rouge2", "rougeL")
    hub = on_hub("rouge") if predictions else None
    if hub is not None:  # its aggregator draws bootstrap samples, so its result varies
        settings = {"rouge_types": list(names), "use_stemmer": True, "use_aggregator": False}
        scores = hub.compute(predictions=list(predictions), references=list(references), **settings)
    else:
        scorer = RougeScorer(names, use_stemmer=True)
        rows = [scorer.score(reference, guess) for guess, reference in zip(predictions, references, strict=True)]
        scores = {name: [row[name].fmeasure for row in rows] for name in names}
    return {name: 100 * float(sum(scores[name])) / max(len(predictions), 1) for name in names}


def caption_tokens(caption: str) -> str:
    """Lower-case words and numbers, separated by spaces, for CIDEr and BLEU of captions. (The usual PTB tokenizer needs Java.)"""
    return " ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", caption.lower()))


def cider(predictions: Texts, references: Texts) -> dict[str, float]:
    """CIDEr times 100, in [0, 1000], by pycocoevalcap, on the tokens of ``caption_tokens``.

    Source: Vedantam et al. 2015; document frequencies are those of the references.
    """
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError as error:
        raise missing_extra("pycocoevalcap", "captioning", "--metrics cider") from error
    scorer = CiderScorer(n=4, sigma=6.0)
    for guess, reference in zip(predictions, references, strict=True):
        scorer += (caption_tokens(guess), [caption_tokens(reference)])
    return {"cider_regex_tokens": 100 * float(scorer.compute_score()[0])}


def bleu4(predictions: Texts, references: Texts) -> dict[str, float]:
    """Corpus BLEU-4 of captions in [0, 100], by pycocoevalcap, on the tokens of ``caption_tokens``."""
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    except ImportError as error:
        raise missing_extra("pycocoevalcap", "captioning", "--metrics bleu4") from error
    scorer = BleuScorer(n=4)
    for guess, reference in zip(predictions, references, strict=True):
        scorer += (caption_tokens(guess), [caption_tokens(reference)])
    return {"bleu4_regex_tokens": 100 * float(scorer.compute_score(option="closest", verbose=0)[0][3])}


def answers(predictions: Texts, references: Texts) -> dict[str, float]:
    """Exact match and mean word F1 in [0, 100] of answers without case, punctuation and articles, as in SQuAD."""
    pairs = [(_answer(guess), _answer(reference)) for guess, reference in zip(predictions, references, strict=True)]
    count = max(len(pairs), 1)
    overlap = [_word_f1(guess.split(), reference.split()) for guess, reference in pairs]
    return {
        "exact_match": 100 * sum(guess == reference for guess, reference in pairs) / count,
        "f1": 100 * sum(overlap) / count,
    }


def _answer(words: str) -> str:
    plain = "".join(c for c in words.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _word_f1(guess: list[str], reference: list[str]) -> float:
    if not guess or not reference:
        return float(guess == reference)
    return 2 * sum((Counter(guess) & Counter(reference)).values()) / (len(guess) + len(reference))


TEXT_METRICS: dict[str, Callable[[Texts, Texts], dict[str, float]]] = {
    "bleu": bleu,
    "rouge": rouge,
    "cider": cider,
    "bleu4": bleu4,
    "answers": answers,
}


def score_texts(names: Sequence[str], predictions: Texts, references: Texts) -> dict[str, float]:
    """Compute the metrics ``names``."""
    for name in names:
        if name not in TEXT_METRICS:
            raise unknown("metric", name, TEXT_METRICS)
    clean = [[text.strip() for text in texts] for texts in (predictions, references)]
    return {key: value for name in names for key, value in TEXT_METRICS[name](*clean).items()}
