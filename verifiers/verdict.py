"""What a verifier says: an outcome that is never a guess, with its evidence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """The six things a verifier can say about an answer.

    Only the first three may become a reward. The last three say that the
    answer could not be judged, and must be masked, never counted as wrong.
    """

    CORRECT = "correct"
    INCORRECT = "incorrect"
    NO_ANSWER = "no_answer"
    GOLD_UNPARSEABLE = "gold_unparseable"
    TIMEOUT = "timeout"
    ERROR = "error"


_SCORABLE = frozenset({Outcome.CORRECT, Outcome.INCORRECT, Outcome.NO_ANSWER})


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judged answer.

    Attributes:
        outcome: What was decided.
        extracted: The answer as it stands in the text; None when none was found.
        span: Its half-open position `(start, end)` in the text; None when the
            answer is not one stretch of the text or none was found.
        gold_normal: Normal form of the gold; None when it was not needed or
            could not be read.
        answer_normal: Normal form of the answer; None likewise.
        rule: Name of the rule that decided, for example `rational` or `no_box`.
        ms: Wall time of the judgement in milliseconds.
        detail: What a person needs beyond the rule; None when there is nothing.
        score: Graded result in a checker's own range; None for checkers that
            only tell right from wrong.
        steps: Per-step rewards in the order of the steps; None for checkers
            without steps.
    """

    outcome: Outcome
    extracted: str | None = None
    span: tuple[int, int] | None = None
    gold_normal: str | None = None
    answer_normal: str | None = None
    rule: str = ""
    ms: float = 0.0
    detail: str | None = None
    score: float | None = None
    steps: tuple[float | None, ...] | None = None

    @property
    def is_correct(self) -> bool:
        """Whether the answer was judged right."""
        return self.outcome is Outcome.CORRECT

    @property
    def is_scorable(self) -> bool:
        """Whether the verdict may become a reward (correct, incorrect, no_answer)."""
        return self.outcome in _SCORABLE

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON values; `from_dict` reads it back."""
        return {
            "outcome": self.outcome.value,
            "extracted": self.extracted,
            "span": None if self.span is None else list(self.span),
            "gold_normal": self.gold_normal,
            "answer_normal": self.answer_normal,
            "rule": self.rule,
            "ms": self.ms,
            "detail": self.detail,
            "score": self.score,
            "steps": None if self.steps is None else list(self.steps),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """Rebuild a verdict from `to_dict`.

        Args:
            data: The mapping; keys of later versions are refused, absent
                optional ones take their defaults.

        Returns:
            The verdict.

        Raises:
            ValueError: The outcome is absent or unknown, or a key is unknown.
        """
        known = dict(data)
        if known.get("outcome") not in Outcome._value2member_map_:
            choices = ", ".join(item.value for item in Outcome)
            raise ValueError(
                f"verdict key 'outcome': found {known.get('outcome')!r}, expected one of {choices}"
            )
        extra = sorted(set(known) - set(cls.__slots__))
        if extra:
            raise ValueError(
                f"verdict has unknown keys {extra}; expected a subset of {list(cls.__slots__)}"
            )
        known["outcome"] = Outcome(known["outcome"])
        if known.get("span") is not None:
            known["span"] = (int(known["span"][0]), int(known["span"][1]))
        if known.get("steps") is not None:
            known["steps"] = tuple(known["steps"])
        return cls(**known)


def elapsed_ms(started: float) -> float:
    """Return the milliseconds since a reading of `time.perf_counter`."""
    return (time.perf_counter() - started) * 1000.0
