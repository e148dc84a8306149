"""Runs for which there is too little room, or memory, or right to write."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable
from typing import Any

from faults.attempt import message_of
from faults.trial import Trial


def grow(
    trial: Trial, times: int, widen: Callable[[int], Callable[[], None] | None], *expected: str
) -> list[dict[str, str]]:
    """Let a run end for want of room, give it more, and so on; return where it ended.

    Args:
        trial: The run.
        times: How often room is given; then there is enough.
        widen: Gives room for the n-th time, from 0; returns what the child does first.
        expected: What each message names.
    """
    ended = []
    for number in range(times):
        before = widen(number)
        attempt = trial.attempt(number, before=before)
        status = attempt.finish()
        if not status:
            break
        error = message_of(attempt, status, *expected)
        ended.append({"in": attempt.where, "error": error.replace(str(trial.out), "RUN")})
        trial.tell(**ended[-1])
    widen(-1)
    trial.complete()
    return ended


def fill(trial: Trial, times: int) -> dict[str, Any]:
    """Run on a disk that is full again and again, each time at another moment."""
    # Whole pages are what a tmpfs counts; folders cost nothing.
    pages = sum(-(-size // 4096) for size in trial.sizes)
    rng = trial.rng()
    steps = sorted(rng.randint(2, int(1.1 * pages)) for _ in range(times))

    def widen(number: int) -> None:
        trial.disk.change("size=64m" if number < 0 else f"size={4 * steps[number]}k")

    ended = grow(trial, times, widen, str(trial.out), "No space left")
    return trial.result(ended=ended)


def limit(trial: Trial, times: int) -> dict[str, Any]:
    """Run under a limit on the size of a file that rises from time to time."""
    # Just below the size of some file, so that each has its turn at being cut off; the run's
    # configuration is the first one that is written.
    first = (trial.whole / "config.toml").stat().st_size
    sizes = [first, *sorted(size for size in set(trial.sizes) if size > first)]
    chosen = [sizes[round(n * (len(sizes) - 1) / max(1, times - 1))] for n in range(times)]

    def widen(number: int) -> Callable[[], None] | None:
        if number < 0:
            return None
        most = max(1, chosen[number] - 1)
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    return trial.result(ended=grow(trial, times, widen, str(trial.out), "File too large"))


def refuse(trial: Trial, times: int) -> dict[str, Any]:
    """Take away the right to write when some stages begin."""
    ended = []
    names = list(trial.stages)
    for number, name in enumerate(sorted(trial.rng().sample(names, times), key=names.index)):
        plan = {"kind": "read-only", "stage": name}
        attempt = trial.attempt(number, plan=plan, at=lambda: trial.disk.change("ro"))
        status = attempt.finish()
        trial.disk.change("rw")
        error = message_of(attempt, status, str(trial.out), "Read-only file system")
        ended.append({"in": attempt.where, "error": error.replace(str(trial.out), "RUN")})
        trial.tell(**ended[-1])
    trial.complete()
    return trial.result(ended=ended)


def memory(trial: Trial, times: int) -> dict[str, Any]:
    """Let allocations fail, as torch and Python say it, in training, sampling and grading."""

    def fails(module: str, owner: str, method: str, call: int, how: Callable[[], Any]) -> Any:
        def install() -> None:
            holder: Any = getattr(importlib.import_module(module), owner)
            original, seen = getattr(holder, method), []

            def failing(*words: Any, **named: Any) -> Any:
                seen.append(1)
                if len(seen) == call:
                    how()
                return original(*words, **named)

            setattr(holder, method, failing)

        return install

    def by_torch() -> None:
        import torch

        torch.empty(1 << 60)

    def by_python() -> None:
        bytearray(1 << 62)

    faults = [
        fails("pipeline.trainer", "Trainer", "update", 3, by_torch),
        fails("pipeline.trainer", "Trainer", "update", 7, by_python),
        fails("pipeline.engines.embedded", "EmbeddedEngine", "generate", 2, by_torch),
        fails("verifiers.pool", "VerifierPool", "verify_many", 2, by_python),
        fails("pipeline.trainer", "Trainer", "update", 6, by_torch),
        fails("pipeline.rollout", "Rollouts", "draw", 3, by_torch),
        fails("pipeline.engines.embedded", "EmbeddedEngine", "generate", 16, by_python),
    ][:times]
    ended = grow(trial, len(faults), lambda n: faults[n] if n >= 0 else None, "out of memory")
    return trial.result(ended=ended)
