"""CMATH: Chinese primary-school problems, for evaluation: questions and golds only.

Hub id: weitianwen/cmath. Two files go by this name: the 1,098 test rows with `golden` (the set of
the DeepSeekMath paper) and the 600 rows with `answer` (the set of the Qwen papers). The level is
the school grade.
"""

from __future__ import annotations

from data_prep.jsonl import Row, column
from data_prep.reading import BadGold, Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig

HUB = "weitianwen/cmath"
SPLITS = {"validation": "validation", "test": "test"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "cmath"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row.

    Raises:
        BadGold: The answer is empty.
    """
    where = str(place)
    name = "golden" if "golden" in row else "answer"
    gold = str(column(row, name, (str, int, float), where)).strip()
    if not gold:
        raise BadGold(where, f"column {name!r} is empty", "a number", "mend or remove the row")
    return Problem(
        id=place.id,
        question=column(row, "question", str, where).strip(),
        answer=gold,
        source=place.source,
        split=place.split,
        level=str(column(row, "grade", int, where)),
        where=where,
    )
