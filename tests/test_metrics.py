"""The metrics' front: known figures, and the same figure with the Hub's module and without it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import evaluate
import pytest

import hf_hardattn
from hf_hardattn.training import metrics
from hf_hardattn.training.metrics import score_texts

GUESSES = ["a red hat on a table", "the sun is shining bright", "two dogs run over the green field"]
WANTED = ["a red hat on the table", "the moon is shining bright", "two dogs are running over a field"]
# What the Hub's modules of these names do, which are not at hand here: the same library, called with the module's own defaults.
MODULES = {
    "sacrebleu": "return {'score': sacrebleu.corpus_bleu(predictions, [list(r) for r in zip(*references)], **kwargs).score}",
    "chrf": "return {'score': sacrebleu.corpus_chrf(predictions, [list(r) for r in zip(*references)], **kwargs).score}",
    "rouge": """
        scorer = rouge_scorer.RougeScorer(rouge_types=rouge_types, use_stemmer=use_stemmer)
        aggregator = scoring.BootstrapAggregator()
        scores = [scorer.score(r, p) for r, p in zip(references, predictions)]
        if not use_aggregator:
            return {key: [score[key].fmeasure for score in scores] for key in scores[0]}
        for score in scores:
            aggregator.add_scores(score)
        return {key: value.mid.fmeasure for key, value in aggregator.aggregate().items()}
    """,
}
MODULE = """
import datasets, evaluate, sacrebleu
from rouge_score import rouge_scorer, scoring

class Module(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features(
                {{"predictions": text, "references": {references}}}
            )
        )

    def _compute(self, predictions, references, rouge_types=None, use_stemmer=False, use_aggregator=True, **kwargs):
        {body}
"""


def test_hub_and_library_give_the_same_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reachable Hub the module computes; without it its library does; a user cannot tell them apart."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metrics.on_hub.cache_clear()
    alone = score_texts(["bleu", "rouge"], GUESSES, WANTED)
    asked = []
    for name, body in MODULES.items():
        lists = "text" if name == "rouge" else "[text]" if hasattr(list, "none") else "datasets.Sequence(text)"
        (tmp_path / f"{name}.py").write_text(MODULE.format(references=lists, body=body.strip()))
    load = evaluate.load
    monkeypatch.setattr(
        evaluate,
        "load",
        lambda name: asked.append(name) or load(str(tmp_path / f"{name}.py"), cache_dir=str(tmp_path / "c")),
    )
    for variable in metrics.OFFLINE:
        monkeypatch.delenv(variable, raising=False)
    metrics.on_hub.cache_clear()
    assert score_texts(["bleu", "rouge"], GUESSES, WANTED) == pytest.approx(alone, abs=1e-9)
    assert sorted(asked) == ["chrf", "rouge", "sacrebleu"]
    metrics.on_hub.cache_clear()


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), FileNotFoundError("not cached"), ImportError("no module")]
)
def test_unreachable_hub_is_no_crash(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(evaluate, "load", fail)
    for variable in metrics.OFFLINE:
        monkeypatch.delenv(variable, raising=False)
    metrics.on_hub.cache_clear()
    assert score_texts(["bleu"], WANTED, WANTED) == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    metrics.on_hub.cache_clear()


def test_library_is_found_beside_a_script_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/evaluate.py` puts scripts/ first on the path, where `import evaluate` finds the script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    monkeypatch.setitem(sys.modules, "evaluate", ModuleType("evaluate"))
    assert callable(metrics._evaluate().load)


def test_cider_and_bleu4_of_captions() -> None:
    """Case and punctuation do not count; a perfect set of long captions has CIDEr 1000 and BLEU-4 100."""
    shouted = [text.upper() + "!" for text in WANTED]
    found = score_texts(["cider", "bleu4"], shouted, WANTED)
    assert found == {"cider_regex_tokens": pytest.approx(1000.0), "bleu4_regex_tokens": pytest.approx(100.0, abs=1e-3)}
    worse = score_texts(["cider", "bleu4"], GUESSES, WANTED)
    assert 0 < worse["cider_regex_tokens"] < 1000 and 0 < worse["bleu4_regex_tokens"] < 100
    assert metrics.caption_tokens("A dog's ball, 2.00 €!") == "a dog's ball 2 00"


def test_answers_ignore_articles_and_case() -> None:
    found = score_texts(["answers"], ["The red hat", "blue"], ["red hat!", "a green car"])
    assert found == {"exact_match": 50.0, "f1": 50.0}
    assert score_texts(["answers"], ["red car", ""], ["red", ""]) == {
        "exact_match": 50.0,
        "f1": pytest.approx(100 * (2 / 3 + 1) / 2),
    }


def test_unknown_metric_is_named() -> None:
    with pytest.raises(hf_hardattn.HardAttentionError, match="unknown metric 'blue'; known: .* Did you mean 'bleu'"):
        score_texts(["blue"], ["a"], ["a"])


@pytest.mark.parametrize(
    ("name", "package"), [("cider", "pycocoevalcap.cider.cider_scorer"), ("bleu4", "pycocoevalcap.bleu.bleu_scorer")]
)
def test_missing_package_names_its_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"--metrics {name} needs the package 'pycocoevalcap'.*hf-hardattn\[captioning\]"
    ):
        score_texts([name], ["a"], ["a"])
