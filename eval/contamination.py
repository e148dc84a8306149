"""Each suite against the run's training data: questions that training has seen.

A question is exact when the normalised texts are the same, and near when the same is asked with
a few plain words more or less (see `data_prep.decontaminate`, which the data stage uses to keep
such rows out; this is the check on the outcome).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.decontaminate import Index, Question
from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from data_prep.normalise import normalise
from data_prep.schema import Problem

EXAMPLES = 5
# Where published training files keep the question, the first that is there counts.
COLUMNS = ("question", "problem", "query", "instruction", "prompt")


def training_questions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, question) of a training file: the data stage's problems, or published rows.

    Args:
        path: JSON lines with one of `COLUMNS` as text, or `messages` with a user turn.

    Raises:
        UserError: A row has neither.
    """
    for number, row in read_rows(path):
        identity = str(row.get("id", f"{path.name}, line {number}"))
        turns = row.get("messages", row.get("prompt"))
        question = next((row[c] for c in COLUMNS if isinstance(row.get(c), str)), None)
        if question is None and isinstance(turns, list):
            question = next(
                (
                    t.get("content")
                    for t in turns
                    if isinstance(t, dict) and t.get("role") == "user"
                ),
                None,
            )
        if not isinstance(question, str):
            raise UserError(
                f"{path}, line {number}",
                f"columns {', '.join(map(repr, row))}",
                f"a question as text in one of {', '.join(COLUMNS)}, or a user turn in messages",
                "rename the column, or give another --training file",
            )
        yield identity, question


def contamination(
    suites: Mapping[str, Sequence[Problem]], training: Iterable[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """Return, for every suite, how many of its questions training has seen.

    Args:
        suites: Suite name to its problems.
        training: (id, question) of what training drew from.

    Returns:
        Suite → `questions`, `exact`, `near` (numbers of the suite's questions) and `examples`
        (the suite's question, the training question, both ids, and which kind it is).
    """
    # An index a suite: one question may stand in several (MATH-500 is a part of MATH).
    indexes = {
        name: Index(Question(name, problem.id, problem.question) for problem in problems)
        for name, problems in suites.items()
    }
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in suites}
    for identity, question in training:
        normal = normalise(question)
        for name, index in indexes.items():
            leak = index.find(question, normal)
            if leak is None:
                continue
            kind = "exact" if leak.is_exact else "near"
            known = found[name].get(leak.question.where)
            # One row is enough to count a question; an exact one says more than a near one.
            if known is None or (known["kind"] == "near" and kind == "exact"):
                found[name][leak.question.where] = {
                    "kind": kind,
                    "id": leak.question.where,
                    "question": leak.question.text,
                    "training_id": identity,
                    "training_question": question,
                }
    return {
        name: {
            "questions": len(suites[name]),
            "exact": sum(row["kind"] == "exact" for row in rows.values()),
            "near": sum(row["kind"] == "near" for row in rows.values()),
            "examples": sorted(rows.values(), key=lambda row: (row["kind"], row["id"]))[:EXAMPLES],
        }
        for name, rows in found.items()
    }
