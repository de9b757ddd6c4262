"""The end of a run that somebody asks for from outside, by a signal. Knows nothing of training."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt:
    """Whether a run was asked to end. The first SIGINT or SIGTERM asks, the second acts at once.

    tell: called when it is asked for, from a signal handler.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.asked, self._tell = False, tell
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the signals until `cease`; nothing outside the main thread, whose owner handles signals."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            pass

    def cease(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._tell()
