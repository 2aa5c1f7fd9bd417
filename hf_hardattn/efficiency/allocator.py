"""Fix the allocator settings of the C library, which shift ratios of times by 15 %: page faults cost models of each size differently."""

from __future__ import annotations

import os
import sys

# glibc keeps freed memory instead of returning pages to the system and requesting them again
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def settings() -> dict[str, str | None]:
    """Return the active settings, for the results file."""
    return {name: os.environ.get(name) for name in SETTINGS}


def restart_with_settings() -> None:
    """Restart this Python process with the settings, which glibc reads before ``main``. Do nothing if they are already set."""
    if all(os.environ.get(name) == value for name, value in SETTINGS.items()):
        return
    os.environ.update(SETTINGS)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
