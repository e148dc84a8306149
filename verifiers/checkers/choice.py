"""Multiple choice: the letter, however it is dressed."""

from __future__ import annotations

import re
import time

from ..extract import check_policy, extract
from ..special import plain
from ..verdict import elapsed_ms
from . import Checker, Outcome, Verdict


class ChoiceChecker(Checker):
    r"""Right when exactly the gold's letters are chosen.

    Args:
        letters: The letters that can be chosen.
        policy: How the answer is found.
    """

    examples = (
        ("B", r"The answer is (B).", "correct"),
        ("B", r"\boxed{\text{B}}", "correct"),
        ("B", r"\boxed{AB}", "incorrect"),
        ("B", r"\boxed{}", "no_answer"),
        ("7", r"\boxed{B}", "gold_unparseable"),
    )

    def __init__(self, letters: str = "ABCDEFGHIJ", policy: str = "boxed") -> None:
        """Check the letters and the policy.

        Raises:
            ValueError: No letters, or not capital letters.
        """
        if not re.fullmatch("[A-Z]{2,26}", letters) or len(set(letters)) != len(letters):
            raise ValueError(f"choice: letters is {letters!r}, expected distinct capital letters")
        self.letters = letters
        self.policy = check_policy(policy)
        self._alone = re.compile(rf"(?<![A-Za-z'])[{letters}](?![A-Za-z'])|\b(?:or|not)\b")
        self._leading = re.compile(rf"\(?([{letters}])(?:\)|\b)[.:)]?(?:\s|$)")

    def check(self, gold: str, text: str) -> Verdict:
        """Compare the letters."""
        started = time.perf_counter()
        wanted = self._letters(gold)
        if not wanted:
            return Verdict(Outcome.GOLD_UNPARSEABLE, rule="no_letter", ms=elapsed_ms(started))
        found = extract(text, self.policy, choice=True)
        if not found.candidates:
            return Verdict(Outcome.NO_ANSWER, rule=found.reason, ms=elapsed_ms(started))
        first = found.candidates[0]
        given = self._letters(first.text)
        outcome = Outcome.CORRECT if given == wanted else Outcome.INCORRECT
        return Verdict(
            outcome, first.text, (first.start, first.end), wanted, given or None,
            "choice" if given else "answer_unread", elapsed_ms(started),
        )  # fmt: skip

    def _letters(self, text: str) -> str:
        """The chosen letters in order; "" when the text is no choice."""
        bare = plain(text.replace("$", " ")).strip("*() .")
        packed = re.sub(r"(?i)\band\b|[\s,;&()、和]", "", bare).upper()
        if packed and all(letter in self.letters for letter in packed):
            return "".join(sorted(set(packed)))
        said = plain(text).strip("* ")
        match = self._leading.match(said)
        # "B) 12 apples" chooses B; "A or B" chooses nothing.
        if match is None or self._alone.search(said, match.end()):
            return ""
        return match.group(1)
