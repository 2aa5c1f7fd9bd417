"""The eleven laws of hard attention, one file each; ``cases.py`` makes the cases from the registered names."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
