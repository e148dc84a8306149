r"""MATH: 5,000 competition problems in seven subjects and five levels (Hendrycks et al. 2021).

Published columns: `problem`, `solution` with the gold in its last `\boxed{…}`, `level`, `type`.
"""

from __future__ import annotations

from data_prep.errors import UserError
from data_prep.jsonl import column
from data_prep.schema import Problem
from data_prep.sources._files import final_answer
from eval.suites import SuiteConfig
from eval.suites._rows import suite_rows

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


class Config(SuiteConfig):
    """A local copy by `path`, else the seven parts of the hub's EleutherAI/hendrycks_math."""

    kind: str = "math"


def load(config: Config) -> list[Problem]:
    """Return the problems; level as a digit, "" where the file says "Level ?"."""
    if config.path:
        places = list(suite_rows(config))
    else:
        places = [
            place
            for subject in SUBJECTS
            for place in suite_rows(config, "EleutherAI/hendrycks_math", subject)
        ]
    return [_problem(where, index, row) for index, (where, _, row) in enumerate(places)]


def _problem(where: str, index: int, row: dict) -> Problem:
    question = column(row, "problem", str, where).strip()
    solution = column(row, "solution", str, where)
    gold = final_answer(solution)
    if gold is None:
        raise UserError(
            where,
            f"no gold: column 'solution' has no complete box, it ends {solution[-40:]!r}",
            r"a solution with the answer in \boxed{…}",
            "mend or remove the row",
        )
    return Problem(
        id=f"math-test-{index:05d}",
        question=question,
        answer=gold,
        source="math",
        split="test",
        solutions={"reference": solution},
        level=column(row, "level", str, where).removeprefix("Level ").strip("? "),
        subject=column(row, "type", str, where),
        where=where,
    )
