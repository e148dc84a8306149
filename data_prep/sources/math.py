r"""MATH's published files: `problem`, `solution` with a `\boxed{…}` gold, `level`, `type`.

The gold is the content of the last box (of several that stand side by side, all of them); a
solution that goes on after its box ends in the box once more.

Hub id: EleutherAI/hendrycks_math, in seven configurations, one a subject: "hub" reads them all,
"hub:EleutherAI/hendrycks_math/algebra:test" one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from data_prep.jsonl import Row, column
from data_prep.reading import BadGold, Place, items, strictly
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, end_in_box, final_answer

HUB = "EleutherAI/hendrycks_math"
SPLITS = {"train": "train", "test": "test"}
CONFIGURATIONS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "math"


def read(config: Config, seed: int) -> Iterator[Problem]:
    """Return the problems in the order of the files; `seed` has no say.

    Raises:
        UserError: A row lacks a column or its box.
    """
    return cast(Iterator[Problem], strictly(items(config)))


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row."""
    where = str(place)
    question = column(row, "problem", str, where).strip()
    solution = column(row, "solution", str, where)
    gold = final_answer(solution)
    if gold is None:
        raise BadGold(
            where,
            f"no gold: column 'solution' has no full box, it ends {solution[-40:]!r}",
            r"a solution with the answer in \boxed{…}",
            'mend or remove the row, or set data.on_bad_gold = "skip"',
        )
    return Problem(
        id=place.id,
        question=question,
        answer=gold,
        source=place.source,
        split=place.split,
        solutions={"reference": end_in_box(solution, gold)},
        # MATH writes "Level 5", and "Level ?" where the level is not known.
        level=column(row, "level", str, where).removeprefix("Level ").strip("? "),
        subject=column(row, "type", str, where),
        where=where,
    )
