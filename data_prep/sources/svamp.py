"""SVAMP: one-step word problems, for evaluation: `Body`, `Question`, `Answer`, `Type`, `Equation`.

Hub ids: ChilleD/SVAMP (train 700, test 300) and opencompass/SVAMP (all 1,000 in one file, which
the Qwen and ToRA papers score). The answer is a float that is nearly always whole.
"""

from __future__ import annotations

from data_prep.jsonl import Row, column
from data_prep.reading import BadGold, Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig

HUB = "ChilleD/SVAMP"
SPLITS = {"train": "train", "test": "test"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "svamp"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row.

    Raises:
        BadGold: The answer is empty.
    """
    where = str(place)
    body = column(row, "Body", str, where).strip()
    if body and body[-1] not in ".?!,":
        body += "."  # as the paper joins body and question
    gold = str(column(row, "Answer", (str, int, float), where)).strip().removesuffix(".0")
    if not gold:
        raise BadGold(where, "column 'Answer' is empty", "a number", "mend or remove the row")
    return Problem(
        id=place.id,
        question=f"{body} {column(row, 'Question', str, where).strip()}".strip(),
        answer=gold,
        source=place.source,
        split=place.split,
        subject=column(row, "Type", str, where),
        where=where,
    )
