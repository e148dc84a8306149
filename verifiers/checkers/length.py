"""Length, with a soft edge: for rewards that discourage running on."""

from __future__ import annotations

import time

from . import Checker, Outcome, Verdict

UNITS = ("characters", "words", "lines")


class LengthChecker(Checker):
    r"""Right when the length lies within the limits; the score falls off softly.

    With n the length, the score is 0 up to `maximum - soft`, falls linearly to -1
    at `maximum` and stays there; below `minimum` it is -1.
    Source: the soft overlong penalty of DAPO, on text instead of tokens.

    Args:
        maximum: Largest length.
        minimum: Smallest length.
        soft: Width of the slope before the maximum.
        unit: What is counted: characters, words (split at blanks) or lines.
    """

    examples = (
        ("7", "It is seven.", "correct"),
        ("7", "word " * 5000, "incorrect"),
    )

    def __init__(
        self, maximum: int = 4000, minimum: int = 0, soft: int = 0, unit: str = "words"
    ) -> None:
        """Check the limits.

        Raises:
            ValueError: Limits that leave no room, or an unknown unit.
        """
        if unit not in UNITS:
            raise ValueError(f"length: unit is {unit!r}, expected one of {', '.join(UNITS)}")
        if not 0 <= minimum <= maximum or not 0 <= soft <= maximum - minimum:
            raise ValueError(
                f"length: found minimum {minimum}, maximum {maximum}, soft {soft}; expected "
                "0 <= minimum <= maximum and 0 <= soft <= maximum - minimum"
            )
        self.maximum, self.minimum, self.soft, self.unit = maximum, minimum, soft, unit

    def check(self, gold: str, text: str) -> Verdict:
        """Judge the length; the gold plays no part."""
        started = time.perf_counter()
        size = {"characters": len(text), "lines": text.count("\n") + 1}.get(self.unit)
        size = len(text.split()) if size is None else size
        good = self.minimum <= size <= self.maximum
        return Verdict(
            Outcome.CORRECT if good else Outcome.INCORRECT,
            rule="length",
            ms=(time.perf_counter() - started) * 1000.0,
            detail=f"{size} {self.unit}",
            score=self._score(size),
        )

    def _score(self, size: int) -> float:
        if size > self.maximum or size < self.minimum:
            return -1.0
        over = size - (self.maximum - self.soft)
        return -over / self.soft if over > 0 else 0.0
