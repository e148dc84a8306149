"""The common schema that every source maps to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import UserError
from .jsonl import read_rows

Split = Literal["train", "validation", "test"]
SPLITS = get_args(Split)
# Of the files that `Preference` and `LabelledSteps` become.
JUDGED_VERSION = "2"


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
        group: The problem that this one is a rewrite of; empty for the question itself.
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
    group: str = ""

    def to_row(self) -> dict[str, Any]:
        """Return a JSON-ready row."""
        return asdict(self)


def require_texts(problem: Problem, where: str) -> Problem:
    """Return a problem of whose texts each is one, as a plug-in of the user's own may not make it.

    Args:
        problem: Made by a source or a suite.
        where: The plug-in's file, for problems that name no place of their own.

    Raises:
        UserError: Something else stands for a text, or the split is none.
    """
    if not isinstance(problem, Problem):
        raise UserError(
            where, f"it gives {type(problem).__name__} rows", "data_prep.schema.Problem", "mend it"
        )
    for name in ("id", "question", "answer", "source", "level", "subject", "group"):
        value = getattr(problem, name)
        if not isinstance(value, str):
            raise UserError(
                problem.where or f"{where}, problem {problem.id!r:.40}",
                f"{name} is {value!r:.80}",
                "a text",
                f"make it one: {name}=str(…)",
            )
    if problem.split not in SPLITS:
        raise UserError(
            problem.where or f"{where}, problem {problem.id!r:.40}",
            f"split is {problem.split!r:.40}",
            f"one of {', '.join(SPLITS)}",
            "mend the plug-in",
        )
    return problem


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation of any number of turns, without a gold answer.

    Attributes:
        id: Unique within a run, stable from build to build.
        messages: (role, content) in order; roles are system, user, assistant.
        source: Name of the source's file.
        split: Which side of the split it is on.
        where: File and line that it was read from.
    """

    id: str
    messages: tuple[tuple[str, str], ...]
    source: str
    split: Split
    where: str = ""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one conversation, the first preferred.

    Tokenised, in `data/preference_<split>.parquet` (read by `data_prep.loader.Pairs`):

        id        string
        source    string
        prompt    int32 list, up to and including the header of the assistant's turn
        chosen    int32 list, the preferred answer, end-of-turn token (and eos) included
        rejected  int32 list, the other one, likewise
        margin    float32, null where there are no ratings

    `prompt + chosen` and `prompt + rejected` are whole sequences; nothing is padded or cut.

    Attributes:
        id: Unique within a run, stable from build to build.
        prompt: (role, content) up to where the answers part.
        chosen: The preferred answer.
        rejected: The other one.
        source: Name of the source's file.
        split: Which side of the split it is on.
        margin: How far the ratings are apart; None where there are none.
        where: File and line that it was read from.
    """

    id: str
    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    source: str
    split: Split
    margin: float | None = None
    where: str = ""


@dataclass(frozen=True, slots=True)
class LabelledSteps:
    """A solution cut into steps, each judged.

    Tokenised, in `data/steps_<split>.parquet` (read by `data_prep.loader.Steps`):

        id          string
        source      string
        prompt      int32 list, up to and including the header of the assistant's turn
        completion  int32 list, all steps with a blank line between, end-of-turn token (and eos)
                    included
        step_ends   int32 list, index in `completion` of the last token of each labelled step,
                    ascending: the token that holds the step's last character
        labels      int8 list, 1 good or 0 bad, one for each of `step_ends`
        answer      string, the gold; empty where the source has none

    Neutral steps and steps that were not judged are in `completion` but have no end and no label.

    Attributes:
        id: Unique within a run, stable from build to build.
        question: What the user turn says.
        steps: The steps, in order.
        labels: 1 good, 0 neutral, -1 bad, None not judged; one a step.
        source: Name of the source's file.
        split: Which side of the split it is on.
        answer: Gold answer; empty where the source has none.
        where: File and line that it was read from.
    """

    id: str
    question: str
    steps: tuple[str, ...]
    labels: tuple[int | None, ...]
    source: str
    split: Split
    answer: str = ""
    where: str = ""


Item = Problem | Chat | Preference | LabelledSteps


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
