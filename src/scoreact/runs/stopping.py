"""The end of a run that somebody asks for from outside, by a signal or by no longer reading. Knows nothing of training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

PATIENCE = 20.0  # seconds for the end of an iteration: batch systems kill 30 s after SIGTERM
ASKING = ("SIGINT", "SIGTERM")
ALSO = ("SIGHUP", "SIGUSR1")  # where nobody has taken or silenced them: nohup, a requeueing program of the user's


class Interrupt:
    """Whether a run was asked to end. The first signal asks, the second acts at once, wherever the run is.

    So does the first one PATIENCE seconds later, unless it is Ctrl-C: who sent it is about to kill, and the last checkpoint
    is whole. tell: called when it is asked for, from a signal handler.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.asked, self._tell = False, tell
        self._previous: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def ask(self) -> None:
        """From inside: end as after a signal."""
        self.asked = True

    def listen(self) -> None:
        """Take over the signals until `cease`; nothing outside the main thread, whose owner handles signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in (*ASKING, *ALSO):
            number = getattr(signal, name, None)
            if number is None:  # Windows
                continue
            if name in ASKING or signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = signal.signal(number, self._handle)

    def cease(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if number != signal.SIGINT:
            self._timer = threading.Timer(PATIENCE, _again, [number])
            self._timer.daemon = True
            self._timer.start()
        self._tell()


def _again(number: int) -> None:
    """The same signal to the main thread, so that it leaves whatever it waits for."""
    ident = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and ident is not None:
        signal.pthread_kill(ident, number)
    else:
        os.kill(os.getpid(), number)
