"""Judges a single row in a worker process, for `verify` when it needs sympy.

The process is started on first use and kept. `verify` promises its verdict
within the limit even on that first use: when the process is not up in time the
verdict is `timeout`, and the next row finds it ready.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from dataclasses import replace

from .pool import VerifierPool
from .verdict import Outcome, Verdict

LIMIT_S = 0.8
_ROW_S = 0.6
_lock = threading.Lock()
_pools: dict[str, VerifierPool] = {}


def judge(gold: str, text: str, policy: str, started: float) -> Verdict:
    """Judge a row in the shared worker process.

    Args:
        gold: As in `verify`.
        text: As in `verify`.
        policy: As in `verify`.
        started: When the verdict was asked for, by `time.perf_counter`.

    Returns:
        The verdict, `timeout` when it does not come within the limit.
    """
    left = LIMIT_S - (time.perf_counter() - started)
    verdict = _shared(policy).verify_within(gold, text, max(0.0, left))
    ms = (time.perf_counter() - started) * 1000.0
    if verdict is None:
        detail = f"no verdict within {LIMIT_S} s from the process that runs sympy"
        return Verdict(Outcome.TIMEOUT, rule="timeout", ms=ms, detail=detail)
    return replace(verdict, ms=ms)


def _shared(policy: str) -> VerifierPool:
    with _lock:
        if policy not in _pools:
            pool = VerifierPool("boxed", {"policy": policy}, workers=1, time_limit_s=_ROW_S)
            atexit.register(pool.terminate)
            _pools[policy] = pool
        return _pools[policy]


def _renew_lock() -> None:
    """A fork may copy the lock while another thread holds it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
