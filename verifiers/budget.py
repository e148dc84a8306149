"""A deadline for the work on one verdict, kept cooperatively.

Every loop over the parts of an answer asks `check` now and then. Nothing is
interrupted from outside, so this works in any thread and under any event loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 0.4
_state = threading.local()


class OutOfTimeError(Exception):
    """The work on this verdict has used up its time."""


@contextmanager
def deadline(seconds: float = SECONDS) -> Iterator[None]:
    """Give the work inside a time limit; an outer limit stays in force.

    Args:
        seconds: Processor time of this thread, so that a busy machine changes no verdict.
    """
    before = getattr(_state, "until", None)
    until = time.thread_time() + seconds
    _state.until = until if before is None else min(before, until)
    try:
        yield
    finally:
        _state.until = before


def check() -> None:
    """Go on, unless the time is up.

    Raises:
        OutOfTimeError: It is.
    """
    until = getattr(_state, "until", None)
    if until is not None and time.thread_time() > until:
        raise OutOfTimeError
