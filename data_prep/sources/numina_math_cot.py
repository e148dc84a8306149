r"""NuminaMath-CoT: `source`, `problem`, `solution` (and `messages`, the same text again).

Hub id: AI-MO/NuminaMath-CoT (train, test). About two in five solutions are proofs without a
boxed answer; they are dropped, counted as "proof_without_answer".
"""

from __future__ import annotations

from data_prep.jsonl import Row, column
from data_prep.reading import Drop, Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, final_answer, settle

HUB = "AI-MO/NuminaMath-CoT"
SPLITS = {"train": "train", "test": "test"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "numina_math_cot"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row; the gold is what the solution's last box holds.

    Raises:
        Drop: There is no box, or its content cannot be verified.
    """
    where = str(place)
    question = column(row, "problem", str, where).strip()
    solution = column(row, "solution", str, where).strip()
    gold = final_answer(solution)
    if gold is None:
        raise Drop("proof_without_answer")
    return Problem(
        id=place.id,
        question=question,
        answer=gold,
        source=place.source,
        split=place.split,
        solutions={"reference": settle(solution, gold)},
        subject=column(row, "source", str, where),
        where=where,
    )
