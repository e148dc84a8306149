"""MATH-500: the 500 test problems of MATH that PRM800K holds out (Lightman et al. 2023).

Published columns: `problem`, `solution`, `answer`, `subject`, `level` (a number), `unique_id`.
"""

from __future__ import annotations

from data_prep.jsonl import column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import number_text, suite_rows


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's HuggingFaceH4/MATH-500."""

    kind: str = "math500"


def load(config: Config) -> list[Problem]:
    """Return the problems; `unique_id` is the problem's place in the original MATH."""
    return [
        Problem(
            id=column(row, "unique_id", str, where),
            question=column(row, "problem", str, where).strip(),
            answer=column(row, "answer", str, where).strip(),
            source="math500",
            split="test",
            solutions={"reference": column(row, "solution", str, where)},
            level=number_text(column(row, "level", (int, str), where), where, "level"),
            subject=column(row, "subject", str, where),
            where=where,
        )
        for where, _, row in suite_rows(config, "HuggingFaceH4/MATH-500")
    ]
