r"""Minerva-Math: 272 undergraduate problems of science courses (Lewkowycz et al. 2022).

Columns: `problem` or `question`, and `answer`; a copy without `answer` has the gold in the last
`\boxed{…}` of its `solution`.
"""

from __future__ import annotations

from data_prep.errors import UserError
from data_prep.jsonl import column
from data_prep.schema import Problem
from data_prep.sources._files import final_answer
from eval.suites import SuiteConfig
from eval.suites._rows import number_text, suite_rows


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's knoveleng/Minerva-Math."""

    kind: str = "minerva"


def load(config: Config) -> list[Problem]:
    """Return the problems."""
    problems = []
    for where, index, row in suite_rows(config, "knoveleng/Minerva-Math", None, "train"):
        name = "problem" if "problem" in row else "question"
        if "answer" in row:
            gold = number_text(row["answer"], where, "answer")
        else:
            gold = final_answer(column(row, "solution", str, where))
            if gold is None:
                raise UserError(
                    where,
                    "neither a column 'answer' nor a box in 'solution'",
                    "a gold",
                    "mend or remove the row",
                )
        problems.append(
            Problem(
                id=f"minerva-{index:04d}",
                question=column(row, name, str, where).strip(),
                answer=gold,
                source="minerva",
                split="test",
                subject=str(row.get("type") or ""),
                where=where,
            )
        )
    return problems
