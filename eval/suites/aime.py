"""AIME: 30 problems a year, answers from 0 to 999.

Other years by `hub`, such as yentinglin/aime_2025, or by `path`.
"""

from __future__ import annotations

from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._competition import load_competition


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's HuggingFaceH4/aime_2024."""

    kind: str = "aime"


def load(config: Config) -> list[Problem]:
    """Return the problems; columns may be capitalised, golds be numbers or padded text."""
    return load_competition(config, "HuggingFaceH4/aime_2024", "train")
