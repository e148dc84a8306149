"""Ctrl-C and SIGTERM: what is being made is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ctrl-C reaches every process of a terminal, and the process that started this one may hand it
# on: two signals within this time are one wish.
ONE_WISH_S = 1.0


class Interruption:
    """Holds Ctrl-C and SIGTERM back while a unit of work is made.

        with Interruption("shard") as interruption:
            for shard in shards:
                …
                interruption.check()

    The first signal is noted and said; a second one ends the process at once. Signals reach the
    main thread alone, so elsewhere this does nothing.

    Args:
        unit: What is finished first ("step", "shard").
        speaks: Whether this process says so, where several are stopped together.

    Attributes:
        asked: Whether a signal has come.
    """

    def __init__(self, unit: str, speaks: Callable[[], bool] = lambda: True) -> None:
        """Hold nothing back yet."""
        self.unit, self.speaks, self.asked = unit, speaks, False
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def check(self) -> None:
        """End here if a signal has come: what was made is whole.

        Raises:
            KeyboardInterrupt: A signal has come.
        """
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._at > ONE_WISH_S:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._at = True, now
            words = f"\nstopping when this {self.unit} is complete; once more to stop at once\n"
            if self.speaks():
                # Not `print`: the handler may run in the middle of another one.
                os.write(2, words.encode())
