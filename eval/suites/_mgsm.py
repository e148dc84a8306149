"""MGSM: 250 problems of GSM8K's test set in other languages (Shi et al. 2022).

Three layouts are read: the hub's (`question`, `answer_number`), the tab-separated file as rows
(`question`, `answer`), and DeepSeek-Math's (`messages` with the question, `answer`).
"""

from __future__ import annotations

from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import Row, column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import number_text, suite_rows


def load_mgsm(config: SuiteConfig, language: str) -> list[Problem]:
    """Return the problems of one language; golds lose their thousands separators."""
    problems = []
    for where, index, row in suite_rows(config, "juletxara/mgsm", language):
        key = "answer_number" if "answer_number" in row else "answer"
        if key not in row:
            column(row, key, str, where)
        problems.append(
            Problem(
                id=f"mgsm-{language}-{index:04d}",
                question=_question(row, where).strip(),
                answer=number_text(row[key], where, key).replace(",", ""),
                source=f"mgsm_{language}",
                split="test",
                where=where,
            )
        )
    return problems


def _question(row: Row, where: str) -> str:
    if "messages" not in row:
        return column(row, "question", str, where)
    messages: list[Any] = column(row, "messages", list, where)
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "user":
            return column(message, "content", str, f"{where}, column 'messages'")
    raise UserError(
        where,
        "column 'messages' has no user turn",
        "the question as a user turn",
        "mend or remove the row",
    )
