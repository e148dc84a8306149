"""SVAMP: 1,000 variations of one-step word problems (Patel et al. 2021).

Published columns: `Body`, `Question`, `Answer` (a number), `Type`, `ID`. Published scores of the
Qwen and ToRA papers use all 1,000 rows; the hub's test split holds 300 of them.
"""

from __future__ import annotations

from data_prep.jsonl import column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import number_text, suite_rows


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's ChilleD/SVAMP."""

    kind: str = "svamp"


def load(config: Config) -> list[Problem]:
    """Return the problems; the question is the body and what is asked about it."""
    problems = []
    for where, _, row in suite_rows(config, "ChilleD/SVAMP"):
        body = column(row, "Body", str, where).strip()
        number = column(row, "Answer", (int, float, str), where)
        # Some bodies lack their last full stop, which would run into the question.
        joint = " " if body.endswith((".", "?", "!", ",")) else ". "
        problems.append(
            Problem(
                id=column(row, "ID", str, where),
                question=f"{body}{joint}{column(row, 'Question', str, where).strip()}",
                answer=number_text(number, where, "Answer"),
                source="svamp",
                split="test",
                subject=column(row, "Type", str, where),
                where=where,
            )
        )
    return problems
