"""How a run is told to stop, and how it says that it did: saved, and ready to go on."""

from __future__ import annotations

import gc
import os
import signal
import threading
import types
from collections.abc import Callable
from typing import Any

import jax

from eqst import processes

AGAIN_SECONDS = 0.05


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived and the state is saved; or another process is gone. The same
    command goes on, and the exit code is `processes.EXIT_INTERRUPTED`."""


class Signals:
    """Remembers SIGTERM and SIGINT; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_early(self) -> None:
        """Between the stages of the start: leaves if any process was told to; nothing is new."""
        if processes.gathered(int(self.received is not None)).any():
            raise self._early()

    def heeding(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """`say`, for long stages of the start: with each line a process that is alone may leave.

        Of several one that was told to does at the end of the stage, with the others.
        """

        def line(text: str) -> None:
            say(text)
            if self.received is not None and jax.process_count() == 1:
                raise self._early()

        return line

    def _early(self) -> Interrupted:
        return Interrupted(f"{self.name()}: stopped before training; the same command goes on")

    def name(self) -> str:
        """What this process was told to stop by; it may have been another that was."""
        return self.received or "another process was stopped"

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            if not _collecting(frame):
                raise KeyboardInterrupt
            again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
            return
        self.received = signal.Signals(number).name
        if number == signal.SIGINT and os.isatty(2):  # a person waits, for a compilation perhaps
            os.write(2, b"SIGINT: saving after this step; once more ends at once\n")


def _collecting(frame: types.FrameType | None) -> bool:
    """Whether this is a callback of the garbage collector: what is raised there is only printed.

    JAX has one, and after seconds in its compiler it is often the first Python code to run.
    """
    codes = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False
