"""Competition sets whose copies differ in the case of their columns and in the gold's type."""

from __future__ import annotations

from data_prep.jsonl import Row, column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import number_text, suite_rows


def load_competition(config: SuiteConfig, hub: str, split: str) -> list[Problem]:
    """Return the problems of a file with a problem or question, an answer and perhaps an id.

    Args:
        config: The suite's.
        hub: Hub id.
        split: Split on the hub.
    """
    problems = []
    for where, index, raw in suite_rows(config, hub, None, split):
        row: Row = {key.lower(): value for key, value in raw.items()}
        name = "problem" if "problem" in row else "question"
        if "answer" not in row:
            column(raw, "answer", str, where)
        identity = row.get("id", index)
        problems.append(
            Problem(
                id=f"{config.kind}-{identity}",
                question=column(row, name, str, where).strip(),
                answer=_gold(row["answer"], where),
                source=config.kind,
                split="test",
                level=str(row.get("year") or ""),
                where=where,
            )
        )
    return problems


def _gold(value: object, where: str) -> str:
    """Return a gold without zero padding ("073") and without a needless ".0"."""
    text = number_text(value, where, "answer")
    if text.isdigit():
        return str(int(text))
    return text.removesuffix(".0") if text.removesuffix(".0").lstrip("-").isdigit() else text
