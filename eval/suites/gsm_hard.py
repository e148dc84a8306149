"""GSM-hard: GSM8K's test questions with one number replaced by a large one (Gao et al. 2022).

Published columns: `input`, `code`, `target` (a float; 3244047.0999999996 stands for …047.1).
"""

from __future__ import annotations

from data_prep.jsonl import column
from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._rows import suite_rows


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's reasoning-machines/gsm-hard."""

    kind: str = "gsm_hard"


def load(config: Config) -> list[Problem]:
    """Return the problems; golds are rounded to 15 significant digits, what a float holds."""
    problems = []
    for where, index, row in suite_rows(config, "reasoning-machines/gsm-hard", None, "train"):
        target = column(row, "target", (int, float), where)
        whole = float(target).is_integer()
        problems.append(
            Problem(
                id=f"gsm_hard-{index:05d}",
                question=column(row, "input", str, where).strip(),
                answer=str(int(target)) if whole else plain(float(target)),
                source="gsm_hard",
                split="test",
                where=where,
            )
        )
    return problems


def plain(value: float) -> str:
    """Return a float with 15 significant digits and no exponent."""
    text = f"{float(f'{value:.15g}'):.20f}".rstrip("0") if abs(value) < 1e-4 else f"{value:.15g}"
    return f"{float(text):.15f}".rstrip("0").rstrip(".") if "e" in text else text
