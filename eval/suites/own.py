"""A file of one's own: `question` and `answer`, with `id`, `level`, `subject` where wanted."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.jsonl import column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import number_text, suite_rows


class Config(SuiteConfig):
    """`path` is a JSON lines file.

    Attributes:
        question: Name of the column with the question.
        answer: Name of the column with the gold.
    """

    kind: str = "own"
    question: str = "question"
    answer: str = "answer"


def load(config: Config) -> list[Problem]:
    """Return the problems; an `id` column names them, else their number does.

    Raises:
        UserError: There is no path, or a row lacks a column.
    """
    name = Path(config.path or config.hub).stem
    problems = []
    for where, index, row in suite_rows(config):
        if config.answer not in row:
            column(row, config.answer, str, where)
        identity = row.get("id", f"{name}-{index:05d}")
        if not isinstance(identity, str | int):
            raise UserError(
                where, f"column 'id' is {identity!r:.80}", "a text or an integer", "mend the row"
            )
        problems.append(
            Problem(
                id=str(identity),
                question=column(row, config.question, str, where).strip(),
                answer=number_text(row[config.answer], where, config.answer),
                source=name,
                split="test",
                level=str(row.get("level", "")),
                subject=str(row.get("subject", "")),
                where=where,
            )
        )
    return problems
