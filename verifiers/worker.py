"""What runs in a pool's worker process: rows in, verdicts out, over two pipes.

The process is started afresh (never forked), so it inherits no threads, no
locks and no memory of the program that uses the pool. It protects that program
from texts that would hang it or fill its memory. It is no sandbox: a checker of
your own runs here with all of your rights.

Protocol: one JSON value a line. First line in: the settings. First line out:
`"ready"` or `{"failed": reason}`. Then a list of `[gold, text]` in, and lists
of verdicts out, in order, in as many lines as it takes. Before a row that may
be slow everything decided so far is sent, so that the first row without a
verdict is always the one being worked on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import json
import os
import sys
import time
from typing import Any

from . import symbolic
from .checkers import Checker, load_checker
from .verdict import Outcome, Verdict

_FLUSH_S = 0.004


def main() -> None:
    """Serve rows until the input ends."""
    source = sys.stdin.buffer
    # Whatever a checker prints must not mix with the protocol.
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    settings = json.loads(source.readline())
    try:
        checker = _start(settings)
    except Exception as error:
        _send(sink, {"failed": f"{type(error).__name__}: {error}"})
        return
    _send(sink, "ready")
    limit = float(settings["time_limit_s"])
    for line in source:
        rows = json.loads(line)
        # Ends this process if the one that started it dies while a row hangs.
        faulthandler.dump_traceback_later(len(rows) * limit + 10.0, exit=True)
        if not _serve(sink, checker, rows):
            return
        faulthandler.cancel_dump_traceback_later()


def _start(settings: dict[str, Any]) -> Checker:
    symbolic.killable = True
    _limit_memory(int(settings["memory_limit_mb"]))
    checker = load_checker(settings["kind"], settings["options"])
    if settings["warm"]:
        with contextlib.suppress(ImportError):
            import sympy  # noqa: F401 -- loaded before the clock of a row runs
    gc.freeze()
    return checker


def _limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def _serve(sink: io.FileIO, checker: Checker, rows: list[list[str]]) -> bool:
    """Judge rows; False when the process should be replaced."""
    ready: list[list[Any]] = []
    flushed = time.perf_counter()
    for gold, text in rows:
        try:
            verdict = checker.quick(gold, text)
            if verdict is None:
                if ready:
                    _send(sink, ready)
                    ready = []
                    flushed = time.perf_counter()
                verdict = checker.check(gold, text)
        except MemoryError:
            verdict = Verdict(Outcome.ERROR, rule="memory_limit")
            _send(sink, [*ready, pack(verdict)])
            return False
        except RecursionError:
            verdict = Verdict(Outcome.ERROR, rule="too_deep")
        except Exception as error:
            verdict = Verdict(
                Outcome.ERROR, rule="checker_failed", detail=f"{type(error).__name__}: {error}"
            )
        ready.append(pack(verdict))
        if time.perf_counter() - flushed > _FLUSH_S:
            _send(sink, ready)
            ready = []
            flushed = time.perf_counter()
    if ready:
        _send(sink, ready)
    return True


def pack(verdict: Verdict) -> list[Any]:
    """Return a verdict as a list, shorter on the pipe than its `to_dict`."""
    return [
        verdict.outcome.value,
        verdict.extracted,
        verdict.span,
        verdict.gold_normal,
        verdict.answer_normal,
        verdict.rule,
        verdict.ms,
        verdict.detail,
        verdict.score,
        verdict.steps,
    ]


def unpack(packed: list[Any]) -> Verdict:
    """Return the verdict that `pack` took apart."""
    outcome, extracted, span, gold, answer, rule, ms, detail, score, steps = packed
    return Verdict(
        _OUTCOMES[outcome],
        extracted,
        None if span is None else (span[0], span[1]),
        gold,
        answer,
        rule,
        ms,
        detail,
        score,
        None if steps is None else tuple(steps),
    )


_OUTCOMES = {item.value: item for item in Outcome}


def _send(sink: io.FileIO, value: Any) -> None:
    data = memoryview(json.dumps(value, separators=(",", ":")).encode() + b"\n")
    while data:
        written = sink.write(data)
        data = data[written or 0 :]
