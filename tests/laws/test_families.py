"""Every family of models, each kind of site once: what a row of ``models/`` promises. A few families are tried in full by the other laws."""

from __future__ import annotations

import pytest
import transformers
from cases import harden, run
from examples import build
from family_checks import CHECKS, applies, subjects

SUBJECTS = subjects()
CASES = [(name, subject) for subject in SUBJECTS for name in CHECKS if applies(name, subject)]


@pytest.mark.parametrize(("name", "subject"), CASES, ids=[f"{subject}-{name}" for name, subject in CASES])
def test_a_family_keeps_its_promise(name, subject):
    CHECKS[name](subject)


ALIGNED = (
    "BertForTokenClassification",
    "RobertaForMaskedLM",
    "DistilBertForTokenClassification",
    "ModernBertForTokenClassification",
)


@pytest.mark.parametrize("head", ALIGNED)
def test_heads_that_predict_for_every_row_get_every_row(head):
    family = getattr(transformers, head).config_class.model_type
    example = build(family, head)
    harden(example.model.eval(), {"sites": ["text.tokens.0"], "budget": 3})
    shapes = {name: value.shape[:2] for name, value in run(example).items()}
    assert shapes and all(shape == (3, 11) for shape in shapes.values())
