"""Equality of numbers within a tolerance, for data whose golds are measurements."""

from __future__ import annotations

import math
import time

from ..equality import approximate
from ..extract import check_policy, extract
from ..nodes import Node
from ..reading import read
from ..verdict import elapsed_ms
from . import Checker, Outcome, Verdict


class NumericChecker(Checker):
    r"""Right when |answer - gold| <= max(absolute, relative |gold|).

    Both must be single numbers; units are compared as numbers stand.

    Args:
        relative: Relative tolerance.
        absolute: Absolute tolerance.
        policy: How the answer is found.
    """

    examples = (
        ("3.14159", r"\boxed{3.14160}", "correct"),
        ("100", r"\boxed{101}", "incorrect"),
        ("100", r"\boxed{}", "no_answer"),
        ("x+1", r"\boxed{1}", "gold_unparseable"),
    )

    def __init__(
        self, relative: float = 1e-4, absolute: float = 1e-9, policy: str = "boxed"
    ) -> None:
        """Check the tolerances and the policy.

        Raises:
            ValueError: A tolerance that is negative or not finite.
        """
        for name, value in (("relative", relative), ("absolute", absolute)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"numeric: {name} is {value!r}, expected a number of at least 0")
        self.relative, self.absolute = relative, absolute
        self.policy = check_policy(policy)

    def check(self, gold: str, text: str) -> Verdict:
        """Compare the numbers."""
        started = time.perf_counter()
        wanted = _number(gold)
        if wanted is None:
            return Verdict(Outcome.GOLD_UNPARSEABLE, rule="no_number", ms=elapsed_ms(started))
        found = extract(text, self.policy)
        if not found.candidates:
            return Verdict(Outcome.NO_ANSWER, rule=found.reason, ms=elapsed_ms(started))
        for candidate in found.candidates:
            given = _number(candidate.text)
            if given is not None:
                break
        else:
            first = found.candidates[0]
            return Verdict(
                Outcome.INCORRECT, first.text, (first.start, first.end), repr(wanted),
                rule="answer_unread", ms=elapsed_ms(started),
            )  # fmt: skip
        within = abs(given - wanted) <= max(self.absolute, self.relative * abs(wanted))
        return Verdict(
            Outcome.CORRECT if within else Outcome.INCORRECT, candidate.text,
            (candidate.start, candidate.end), repr(wanted), repr(given), "tolerance",
            elapsed_ms(started),
        )  # fmt: skip


def _number(text: str) -> float | None:
    for node in read(text).nodes:
        value = approximate(_bare(node))
        if value is not None:
            return value
    return None


def _bare(node: Node) -> Node:
    if node[0] == "qty":
        return node[1]
    if node[0] == "rel" and len(node[1]) == 3 and node[1][1] == "=" and node[1][0][0] == "sym":
        return _bare(node[1][2])
    return node
