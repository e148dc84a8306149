"""The checker of `grade`: the first character of a text says how to read it."""

from __future__ import annotations

from dataclasses import replace

from ..extract import check_policy
from ..judge import verify_quick, verify_slow
from . import Checker, Verdict


class TaggedChecker(Checker):
    """Judges `r...` by a policy and `a...` as a bare answer.

    Args:
        policy: How the answer of a response is found.
    """

    def __init__(self, policy: str = "boxed") -> None:
        """Check the policy."""
        self.policies = {"r": check_policy(policy), "a": "answer"}

    def quick(self, gold: str, text: str) -> Verdict | None:
        """Decide by the cheap path."""
        verdict = verify_quick(gold, text[1:], policy=self.policies[text[:1]])
        # Positions are those of the text without its tag, which is what the caller has.
        return None if verdict is None else replace(verdict)

    def check(self, gold: str, text: str) -> Verdict:
        """Decide with every rule."""
        return self.quick(gold, text) or verify_slow(gold, text[1:], policy=self.policies[text[:1]])
