r"""MATH's published files: `problem`, `solution` with a `\boxed{…}` gold, `level`, `type`.

Hub id: EleutherAI/hendrycks_math. The gold is the content of the last box; a solution that goes
on after its box ends in the box once more.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.errors import UserError
from data_prep.jsonl import column
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, end_in_box, last_box, rows


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "math"


def read(config: Config, seed: int) -> Iterator[Problem]:
    """Yield the problems in the order of the files; `seed` has no say.

    Raises:
        UserError: A row lacks a column or its box.
    """
    for split, where, index, row in rows(config):
        question = column(row, "problem", str, where).strip()
        solution = column(row, "solution", str, where)
        box = last_box(solution)
        if box is None or not box[0].strip():
            raise UserError(
                where, f"no gold: column 'solution' has no full box, it ends {solution[-40:]!r}",
                r"a solution with the answer in \boxed{…}", "mend or remove the row",
            )
        gold = box[0].strip()
        yield Problem(
            id=f"math-{split}-{index:05d}", question=question, answer=gold, source="math",
            split=split, solutions={"reference": end_in_box(solution, gold)},
            # MATH writes "Level 5", and "Level ?" where the level is not known.
            level=column(row, "level", str, where).removeprefix("Level ").strip("? "),
            subject=column(row, "type", str, where), where=where,
        )
