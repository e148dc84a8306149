r"""OpenMathInstruct-2: `problem`, `generated_solution`, `expected_answer`, `problem_source`.

Hub id: nvidia/OpenMathInstruct-2. Its splits train_1M, train_2M, train_5M and train are nested:
read one, never several. The expected answer of an augmented problem is a majority of samples, not
a gold; a solution whose box contradicts it is dropped, counted.
"""

from __future__ import annotations

from data_prep.jsonl import Row, column
from data_prep.reading import BadGold, Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, settle

HUB = "nvidia/OpenMathInstruct-2"
SPLITS = {"train": "train_1M"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "openmathinstruct2"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row.

    Raises:
        BadGold: The expected answer is empty.
        Drop: The solution's box contradicts it, or it cannot be verified.
    """
    where = str(place)
    gold = column(row, "expected_answer", str, where).strip()
    if not gold:
        raise BadGold(
            where, "column 'expected_answer' is empty", "an answer", "mend or remove the row"
        )
    solution = settle(column(row, "generated_solution", str, where).strip(), gold)
    return Problem(
        id=place.id,
        question=column(row, "problem", str, where).strip(),
        answer=gold,
        source=place.source,
        split=place.split,
        solutions={"reference": solution},
        subject=column(row, "problem_source", str, where),
        where=where,
    )
