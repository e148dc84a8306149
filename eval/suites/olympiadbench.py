"""OlympiadBench's open-ended text problems in English (He et al. 2024).

Published columns: `question`, `final_answer` (a list with one text), `context`, `subfield`,
`is_multiple_answer`, `unit`, `answer_type`, `error`.
"""

from __future__ import annotations

from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import suite_rows


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's Hothan/OlympiadBench, OE_TO_maths_en_COMP."""

    kind: str = "olympiadbench"


def load(config: Config) -> list[Problem]:
    """Return the problems; level says whether several answers are asked for."""
    problems = []
    for where, _, row in suite_rows(config, "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"):
        answers: list[Any] = column(row, "final_answer", list, where)
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(
                where,
                f"column 'final_answer' is {answers!r:.80}",
                "a list of texts",
                "mend or remove the row",
            )
        context = row.get("context") or ""
        question = column(row, "question", str, where).strip()
        problems.append(
            Problem(
                id=f"olympiadbench-{column(row, 'id', (int, str), where)}",
                question=f"{context.strip()}\n{question}".strip(),
                answer=", ".join(_bare(answer) for answer in answers),
                source="olympiadbench",
                split="test",
                level="several answers" if row.get("is_multiple_answer") else "one answer",
                subject=column(row, "subfield", str, where),
                where=where,
            )
        )
    return problems


def _bare(answer: str) -> str:
    """Return an answer without the dollars around the whole of it."""
    answer = answer.strip()
    inner = answer[1:-1]
    is_one_formula = answer.startswith("$") and answer.endswith("$") and "$" not in inner
    return inner.strip() if is_one_formula and inner.strip() else answer
