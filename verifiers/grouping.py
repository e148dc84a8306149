"""Groups answers that are equal, for majority voting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import quick
from .judge import verify

Equal = Callable[[str, str], bool]


def group_answers(
    answers: Sequence[str | None], *, equal: Equal | None = None, symbolic: bool = True
) -> list[int | None]:
    """Number the equivalence classes of answers.

    Classes are numbered in the order in which they first appear. An answer joins
    the first class whose first member it equals, so a class has one
    representative, and the result does not depend on how equality chains.

    Args:
        answers: Extracted answers; None (no answer) never votes.
        equal: Equality of two answers; default the suite's own, under the
            policy `answer`, tried both ways round.
        symbolic: False groups by tidied string only, the "string classes" that
            evaluation reports beside the symbolic ones.

    Returns:
        The class of each answer; None for None.
    """
    same = equal or _equal
    numbers: dict[str, int] = {}
    representatives: list[str] = []
    out: list[int | None] = []
    for answer in answers:
        if answer is None:
            out.append(None)
            continue
        key = quick.tidy(answer)
        if key not in numbers:
            number = None
            if symbolic:
                number = next(
                    (n for n, first in enumerate(representatives) if same(first, key)), None
                )
            if number is None:
                number = len(representatives)
                representatives.append(key)
            numbers[key] = number
        out.append(numbers[key])
    return out


def _equal(first: str, second: str) -> bool:
    """Equality that neither answer decides alone: no rounding to one side's digits."""
    return (
        verify(first, second, policy="answer").is_correct
        and verify(second, first, policy="answer").is_correct
    )
