"""The default checker: mathematical equality of the extracted answer."""

from __future__ import annotations

from ..extract import check_policy
from ..judge import verify_quick, verify_slow
from . import Checker, Verdict


class BoxedChecker(Checker):
    r"""Judges by `verifiers.verify`.

    Args:
        policy: How the answer is found; the default asks for `\boxed{}` first.
    """

    examples = (
        ("1/2", r"so it is \boxed{\frac{1}{2}}", "correct"),
        ("1/2", r"so it is \boxed{\frac{1}{3}}", "incorrect"),
        ("1/2", r"so it is \boxed{}", "no_answer"),
        ("", r"\boxed{1}", "gold_unparseable"),
    )

    def __init__(self, policy: str = "boxed") -> None:
        """Remember the policy, and refuse one that does not exist."""
        self.policy = check_policy(policy)

    def quick(self, gold: str, text: str) -> Verdict | None:
        """Decide by the cheap path."""
        return verify_quick(gold, text, policy=self.policy)

    def check(self, gold: str, text: str) -> Verdict:
        """Decide with every rule."""
        return verify_quick(gold, text, policy=self.policy) or verify_slow(
            gold, text, policy=self.policy
        )
