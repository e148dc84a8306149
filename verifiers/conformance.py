"""What every checker must keep, as runnable checks: for ours and for yours.

`python -m verifiers check my_checker.py` runs them on a file of yours, and
`tests/conformance/test_checkers.py` on every checker here.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from .checkers import Checker, load_checker
from .pool import VerifierPool
from .verdict import Outcome, Verdict

LIMIT_S = 1.0
STRANGE = (
    "", " ", "\x00", "\ud800", "\\boxed{", "\\boxed{}", "}" * 500, "{" * 500, "(" * 5000,
    "\\boxed{" * 1000, "$" * 2001, "\\frac" * 500, "9" * 6000, "\\boxed{" + "9" * 6000 + "}",
    "\\boxed{9^{9^{9^{9}}}}", "\\boxed{((9!)!)!}", "\\boxed{1e999999999}", "\u202e\u200b７７",
    "final answer is " * 2000, "a" * 100_000, "\\boxed{\\def\\x{\\x\\x}\\x}",
    "__import__('os').system('true')", "{{item.reference}}", '{"result": NaN}', "NaN", "\\[" * 3000,
)  # fmt: skip


def run(kind: str, options: Mapping[str, Any] | None = None) -> list[tuple[str, str | None]]:
    """Run every check on a checker.

    Args:
        kind: A name or a path, as in `load_checker`.
        options: Its options.

    Returns:
        `(check, problem)` pairs; the problem is None where the check holds.
    """
    results = []
    for name, check in CHECKS.items():
        try:
            problem = check(kind, dict(options or {}))
        except Exception as error:  # a checker of yours may raise anything
            problem = f"raised {type(error).__name__}: {error}"
        results.append((name, problem))
    return results


def _examples_hold(kind: str, options: dict[str, Any]) -> str | None:
    checker = load_checker(kind, options)
    if not checker.examples and not checker.needs_endpoint:
        return (
            "no examples; give (gold, text, outcome) rows, at least one for each outcome it returns"
        )
    for gold, text, outcome in checker.examples:
        found = checker.check(gold, text)
        if found.outcome != outcome:
            seen = f"found {found.outcome.value} ({found.rule}), expected {outcome}"
            return f"check({gold!r}, {text!r}): {seen}"
    return None


def _examples_discriminate(kind: str, options: dict[str, Any]) -> str | None:
    checker = load_checker(kind, options)
    outcomes = {outcome for _, _, outcome in checker.examples}
    if checker.needs_endpoint or {"correct", "incorrect"} <= outcomes:
        return None
    return f"examples show only {sorted(outcomes)}; a checker must be able to accept and to refuse"


def _never_raises(kind: str, options: dict[str, Any]) -> str | None:
    checker = load_checker(kind, options)
    texts = STRANGE[:3] if checker.needs_endpoint else STRANGE
    rows = [(gold, text) for text in texts for gold in ("7", text)]
    if not checker.bounded:
        rows = rows[::8]  # each may cost its whole limit
        with VerifierPool(
            kind, options, workers=1, memory_limit_mb=1024, time_limit_s=LIMIT_S
        ) as pool:
            verdicts = pool.verify_many(rows)
        problems = (_malformed(v, text) for v, (_, text) in zip(verdicts, rows, strict=True))
        return next((problem for problem in problems if problem), None)
    for gold, text in rows:
        started, worked = time.perf_counter(), time.thread_time()
        verdict = checker.quick(gold, text) or checker.check(gold, text)
        spent, work = time.perf_counter() - started, time.thread_time() - worked
        problem = _malformed(verdict, text)
        # A busy machine stretches the wall time of work that is well within the limit.
        slow = max(work, spent / 10)
        if problem is None and slow > LIMIT_S and not checker.needs_endpoint:
            problem = f"took {spent:.2f} s, {work:.2f} of them at work; the limit is {LIMIT_S}"
        if problem:
            return f"gold {gold!r:.40}, text {text!r:.40}: {problem}"
    return None


def _malformed(verdict: Any, text: str) -> str | None:
    if not isinstance(verdict, Verdict) or not isinstance(verdict.outcome, Outcome):
        return f"returned {type(verdict).__name__}, expected a Verdict"
    if not verdict.rule:
        return "the verdict has no rule"
    if not verdict.ms >= 0:
        return f"ms is {verdict.ms}"
    if verdict.span is not None:
        start, end = verdict.span
        if not 0 <= start <= end <= len(text):
            return f"span {verdict.span} lies outside the text of {len(text)} characters"
    if Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) != verdict:
        return "the verdict does not survive JSON"
    return None


def _deterministic(kind: str, options: dict[str, Any]) -> str | None:
    first, second = load_checker(kind, options), load_checker(kind, options)
    for gold, text, _ in first.examples:
        seen = [_timeless(c.check(gold, text)) for c in (first, first, second)]
        if seen[0] != seen[1] or seen[0] != seen[2]:
            return f"check({gold!r}, {text!r}) gives different verdicts: {seen[0]} and {seen[-1]}"
    return None


def _quick_agrees(kind: str, options: dict[str, Any]) -> str | None:
    checker = load_checker(kind, options)
    for gold, text, _ in checker.examples:
        quick = checker.quick(gold, text)
        if quick is not None and quick.outcome != checker.check(gold, text).outcome:
            return f"quick and check differ on {gold!r}, {text!r}"
    return None


def _same_in_a_thread(kind: str, options: dict[str, Any]) -> str | None:
    checker = load_checker(kind, options)
    seen: list[Verdict] = []
    thread = threading.Thread(
        target=lambda: seen.extend(checker.check(g, t) for g, t, _ in checker.examples)
    )
    thread.start()
    thread.join()
    here = [checker.check(g, t) for g, t, _ in checker.examples]
    if list(map(_timeless, seen)) != list(map(_timeless, here)):
        return "verdicts in a thread differ from those in the main thread"
    return None


def _same_in_the_pool(kind: str, options: dict[str, Any]) -> str | None:
    checker = load_checker(kind, options)
    rows = [(gold, text) for gold, text, _ in checker.examples]
    with VerifierPool(kind, options, workers=1, memory_limit_mb=1024, time_limit_s=5.0) as pool:
        pooled = pool.verify_many(rows)
    here = [checker.check(gold, text) for gold, text in rows]
    if list(map(_timeless, pooled)) != list(map(_timeless, here)):
        return (
            "verdicts in the pool differ; options must be JSON, and check must not use outer state"
        )
    return None


def _refuses_unknown_options(kind: str, options: dict[str, Any]) -> str | None:
    try:
        load_checker(kind, {**options, "no_such_option": 1})
    except ValueError:
        return None
    return "an option that does not exist is accepted"


def _timeless(verdict: Verdict) -> Verdict:
    return dataclasses.replace(verdict, ms=0.0)


CHECKS: dict[str, Callable[[str, dict[str, Any]], str | None]] = {
    "examples hold": _examples_hold,
    "examples show right and wrong": _examples_discriminate,
    "strange texts neither raise nor take long": _never_raises,
    "verdicts do not change": _deterministic,
    "quick agrees with check": _quick_agrees,
    "the same in a thread": _same_in_a_thread,
    "the same in the pool": _same_in_the_pool,
    "unknown options are refused": _refuses_unknown_options,
}

__all__ = ["CHECKS", "LIMIT_S", "STRANGE", "Checker", "run"]
