"""Every family of models, each kind of site once: what a row of ``models/`` promises. A few families are tried in full by the other laws."""

from __future__ import annotations

import pytest
from family_checks import CHECKS, applies, subjects

SUBJECTS = subjects()
CASES = [(name, subject) for subject in SUBJECTS for name in CHECKS if applies(name, subject)]


@pytest.mark.parametrize(("name", "subject"), CASES, ids=[f"{subject}-{name}" for name, subject in CASES])
def test_a_family_keeps_its_promise(name, subject):
    CHECKS[name](subject)
