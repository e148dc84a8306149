"""String equality of the extracted answer."""

from __future__ import annotations

import time

from ..extract import check_policy, extract
from ..verdict import elapsed_ms
from . import Checker, Outcome, Verdict


class ExactChecker(Checker):
    r"""Right when the extracted answer is the gold, character by character.

    Args:
        policy: How the answer is found; `whole` takes the text as it is.
        strip: Ignore blanks around both.
        ignore_case: Ignore case.
    """

    examples = (
        ("7", r"\boxed{7}", "correct"),
        ("7", r"\boxed{7.0}", "incorrect"),
        ("7", r"\boxed{}", "no_answer"),
        ("", r"\boxed{7}", "gold_unparseable"),
    )

    def __init__(
        self, policy: str = "boxed", *, strip: bool = True, ignore_case: bool = False
    ) -> None:
        """Check the policy."""
        self.policy = policy if policy == "whole" else check_policy(policy)
        self.strip = strip
        self.ignore_case = ignore_case

    def check(self, gold: str, text: str) -> Verdict:
        """Compare the strings."""
        started = time.perf_counter()
        span: tuple[int, int] | None = (0, len(text))
        answer: str | None = text
        if self.policy != "whole":
            found = extract(text, self.policy)
            if not found.candidates:
                return Verdict(Outcome.NO_ANSWER, rule=found.reason, ms=elapsed_ms(started))
            first = found.candidates[0]
            answer, span = first.text, (first.start, first.end)
        wanted, given = self._normal(gold), self._normal(answer)
        if not wanted:
            return Verdict(Outcome.GOLD_UNPARSEABLE, rule="empty_gold", ms=elapsed_ms(started))
        outcome = Outcome.CORRECT if wanted == given else Outcome.INCORRECT
        return Verdict(outcome, answer, span, wanted, given, "exact", elapsed_ms(started))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text
