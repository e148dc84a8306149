"""MGSM: grade-school problems in many languages, for evaluation: questions and golds only.

Hub id: juletxara/mgsm (a configuration a language; `question`, `answer_number`; `answer` is null
in the test split). Also read: the original two columns (`question`, `answer`), and DeepSeekMath's
`messages` with `answer`.
"""

from __future__ import annotations

from data_prep.jsonl import Row, column
from data_prep.reading import BadGold, Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig

HUB = "juletxara/mgsm/zh"
SPLITS = {"train": "train", "test": "test"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "mgsm"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row.

    Raises:
        BadGold: The answer is empty.
    """
    where = str(place)
    if "messages" in row and "question" not in row:
        first = column(row, "messages", list, where)[:1] or [{}]
        question = column(first[0], "content", str, where)
    else:
        question = column(row, "question", str, where)
    name = "answer_number" if "answer_number" in row else "answer"
    gold = str(column(row, name, (str, int, float), where)).replace(",", "").strip()
    if not gold:
        raise BadGold(where, f"column {name!r} is empty", "a number", "mend or remove the row")
    return Problem(
        id=place.id,
        question=question.strip(),
        answer=gold.removesuffix(".0"),
        source=place.source,
        split=place.split,
        where=where,
    )
