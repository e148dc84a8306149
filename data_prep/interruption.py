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
# A signal may reach a whole group of processes and be handed on by the one that started this one:
# one of another kind, or of the same kind within this time, is the same wish.
ONE_WISH_S = 2.0
# Those that hold signals back.
_held: list[Interruption] = []


def check_all() -> None:
    """End here if a signal has come that somebody holds back: while nothing is made yet.

    Raises:
        KeyboardInterrupt: A signal has come.
    """
    for interruption in tuple(_held):
        interruption.check()


class Interruption:
    """Holds Ctrl-C and SIGTERM back while a unit of work is made.

        with Interruption("shard") as interruption:
            for shard in shards:
                …
                interruption.check()

    The first signal is noted and said; a second one, two seconds later or more, ends the process
    at once. Signals reach the main thread alone, so elsewhere this does nothing. One that is
    ignored stays so: a background job of a script is no business of Ctrl-C.

    Args:
        unit: What is finished first ("step", "shard").
        speaks: Whether this process says so, where several are stopped together.

    Attributes:
        asked: Whether a signal has come.
    """

    def __init__(self, unit: str, speaks: Callable[[], bool] = lambda: True) -> None:
        """Hold nothing back yet."""
        self.unit, self.speaks, self.asked = unit, speaks, False
        self._first: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
            _held.append(self)
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
        if self in _held:
            _held.remove(self)

    def check(self) -> None:
        """End here if a signal has come: what was made is whole.

        Raises:
            KeyboardInterrupt: A signal has come.
        """
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first.setdefault(number, now) > ONE_WISH_S:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            words = (
                f"\nstopping when this {self.unit} is complete; "
                "once more in two seconds to stop now\n"
            )
            if self.speaks():
                # Not `print`: the handler may run in the middle of another one.
                os.write(2, words.encode())
