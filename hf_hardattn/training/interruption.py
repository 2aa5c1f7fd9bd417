"""Handle the SIGTERM of a job scheduler: record it, and stop between two optimizer steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from accelerate import Accelerator

TERMINATED = 128 + int(signal.SIGTERM)  # 143, the exit status that a shell reports for a process ended by SIGTERM


class Interruption:
    """Record SIGTERM while the block runs; ``requested`` tells all processes if one of them received it.

    Outside the main thread, where Python allows no signal handler, it records nothing.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.noted = accelerator, False
        self.before: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def requested(self) -> bool:
        """Whether any process received SIGTERM; all processes must call this at the same step."""
        if self.accelerator.num_processes == 1:
            return self.noted
        if self.noted:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
