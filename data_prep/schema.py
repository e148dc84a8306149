"""The common schema that every source maps to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import UserError
from .jsonl import read_rows

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its gold answer.

    Attributes:
        id: Unique within a run, stable from build to build.
        question: What the user turn says.
        answer: The gold answer, as the verifier reads it (no box, no "####").
        source: Name of the source's file.
        split: Which side of the split it is on.
        solutions: Worked solutions by style ("worked", "bare", "reference"), each ending in
            a box; empty for problems that only serve evaluation or reinforcement.
        level: Difficulty as the source states it, as text; empty where it does not.
        subject: Topic as the source states it; empty where it does not.
        where: File and line that it was read from; empty for generated problems.
    """

    id: str
    question: str
    answer: str
    source: str
    split: Split
    solutions: dict[str, str] = field(default_factory=dict)
    level: str = ""
    subject: str = ""
    where: str = ""

    def to_row(self) -> dict[str, Any]:
        """Return a JSON-ready row."""
        return asdict(self)


def read_problems(path: str | Path) -> Iterator[Problem]:
    """Read problems that `data_prep.build` wrote.

    Raises:
        UserError: A row lacks a field or has one too many.
    """
    for number, row in read_rows(path):
        try:
            yield Problem(**row)
        except TypeError as error:
            raise UserError(
                f"{path}, line {number}", str(error), "a row of data_prep.build", "build again"
            ) from None
