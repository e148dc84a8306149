"""What a verdict costs, counted in calls: the same on every machine and under every load.

What one call of a regular expression may take is bounded by the seconds after which it has hung.
"""

import sys
import time
from typing import Any

from verifiers import Verdict, verify

CALLS = 2_000_000  # a second or less on any machine of today; the worst text here takes 1.2 million
HUNG = 20.0  # seconds; the slowest text here takes 0.4


def work(gold: str, text: str, policy: str = "boxed") -> tuple[int, Verdict]:
    """Calls that a verdict takes, those of C functions too, and the verdict."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    began = time.thread_time()
    sys.setprofile(count)
    try:
        verdict = verify(gold, text, policy=policy)
    finally:
        sys.setprofile(None)
    assert time.thread_time() - began < HUNG
    return calls, verdict
