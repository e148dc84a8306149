"""Questions of any file, with their golds where it has them: no solutions.

For evaluation suites that a mixture must not contain, and for problems of one's own to reinforce.
The question stands in the first of the columns `problem`, `question`, `Problem`, `Question` and
`input`; the gold, if there is one, in the first of `answer`, `Answer`, `golden`, `target`,
`final_answer` and `answer_number` (the only entry, where that is a list).
"""

from __future__ import annotations

from data_prep.errors import UserError
from data_prep.jsonl import Row, column
from data_prep.reading import Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig

QUESTIONS = ("problem", "question", "Problem", "Question", "input")
GOLDS = ("answer", "Answer", "golden", "target", "final_answer", "answer_number")


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "questions"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row; its gold is empty where no column has one.

    Raises:
        UserError: There is no question.
    """
    where = str(place)
    name = next((name for name in QUESTIONS if name in row), QUESTIONS[0])
    question = column(row, name, str, where).strip()
    if not question:
        raise UserError(where, f"column {name!r} is empty", "a question", "mend or remove the row")
    found = next((row[key] for key in GOLDS if row.get(key) is not None), "")
    if isinstance(found, list):
        found = found[0] if len(found) == 1 else ""
    gold = str(found).strip() if isinstance(found, str | int | float) else ""
    return Problem(
        id=place.id,
        question=question,
        answer=gold,
        source=place.source,
        split=place.split,
        where=where,
    )
