"""CMATH: Chinese primary-school problems by grade (Wei et al. 2023).

Two public sets go by one name: 1,098 test rows (`question`, `golden`, the set of the
DeepSeekMath paper) and 600 development rows (`question`, `answer`, the set of the Qwen papers),
with 3 questions in common. Here they are two suites, so that no number is held against the
other set's.
"""

from __future__ import annotations

from data_prep.errors import UserError
from data_prep.jsonl import column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import number_text, suite_rows


def load_cmath(
    config: SuiteConfig, name: str, split: str, golds: tuple[str, ...], rows: int, other: str
) -> list[Problem]:
    """Return the problems of one set.

    Args:
        config: The suite's.
        name: The suite's name, first part of the ids.
        split: Split on the hub.
        golds: Names that the gold's column goes by, the first that is there counts.
        rows: Number of rows of this set.
        other: Suite that reads the other set.

    Raises:
        UserError: A column is missing, or the file is of the other set.
    """
    problems = []
    for where, index, row in suite_rows(config, "weitianwen/cmath", None, split):
        key = next((key for key in golds if key in row), golds[0])
        if key not in row:
            column(row, key, str, where)
        problems.append(
            Problem(
                id=f"{name}-{index:05d}",
                question=column(row, "question", str, where).strip(),
                answer=number_text(row[key], where, key),
                source=name,
                split="test",
                level=number_text(column(row, "grade", (int, str), where), where, "grade"),
                subject=f"{column(row, 'reasoning_step', int, where)} steps"
                if "reasoning_step" in row
                else "",
                where=where,
            )
        )
    if len(problems) in (600, 1098) and len(problems) != rows:
        raise UserError(
            config.path or config.kind,
            f"{len(problems)} rows: the other public CMATH set",
            f"the {rows} rows of {name}",
            f"use --suites {other}=FILE for this file",
        )
    return problems
