"""AMC 2023: 40 problems with integer answers.

Copies differ in the type of the gold (27 or "27.0").
"""

from __future__ import annotations

from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._competition import load_competition


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's knoveleng/AMC-23."""

    kind: str = "amc"


def load(config: Config) -> list[Problem]:
    """Return the problems; columns may be capitalised, golds be numbers or padded text."""
    return load_competition(config, "knoveleng/AMC-23", "train")
