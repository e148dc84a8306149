"""GSM8K: 1,319 grade-school word problems (Cobbe et al. 2021).

Published columns: `question`, and `answer` that ends in "#### <number>".
"""

from __future__ import annotations

from data_prep.jsonl import column
from data_prep.schema import Problem
from data_prep.sources.gsm8k import split_answer
from eval.suites import SuiteConfig
from eval.suites._rows import suite_rows


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's openai/gsm8k."""

    kind: str = "gsm8k"


def load(config: Config) -> list[Problem]:
    """Return the problems; the gold stands after "####", without thousands separators."""
    problems = []
    for where, index, row in suite_rows(config, "openai/gsm8k", "main"):
        gold, solution = split_answer(column(row, "answer", str, where), where)
        problems.append(
            Problem(
                id=f"gsm8k-test-{index:05d}",
                question=column(row, "question", str, where).strip(),
                answer=gold,
                source="gsm8k",
                split="test",
                solutions={"reference": solution},
                where=where,
            )
        )
    return problems
