"""Fix the C library's allocator, which moves ratios of times by 15 %: page faults cost, and models of different sizes pay differently."""

from __future__ import annotations

import os
import sys

# glibc keeps what is freed, instead of handing pages back to the system and asking for them again
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def settings() -> dict[str, str | None]:
    """The settings in force, for the results file."""
    return {name: os.environ.get(name) for name in SETTINGS}


def restart_with_settings() -> None:
    """Start this Python process again with the settings: glibc reads them before ``main``. Does nothing where they are set already."""
    if all(os.environ.get(name) == value for name, value in SETTINGS.items()):
        return
    os.environ.update(SETTINGS)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
