"""The page of everyday situations says what happens today."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/docs/what_happens.py"


def test_every_situation_is_on_the_page() -> None:
    spec = importlib.util.spec_from_file_location("what_happens", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in script.PAGE.read_text().splitlines() if " | " in line]
    written = [row for row in rows if row != "situation"]
    assert written == [situation.__doc__ for section in script.SECTIONS.values() for situation in section]
    assert len(written) >= 20


@pytest.mark.slow
def test_the_page_says_what_happens_today() -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True, timeout=600)
