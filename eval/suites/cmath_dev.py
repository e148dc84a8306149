"""CMATH's 600 development rows, the set of the Qwen papers; see `eval.suites._cmath`."""

from __future__ import annotations

from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._cmath import load_cmath

LANGUAGE = "zh"


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's weitianwen/cmath, split validation."""

    kind: str = "cmath_dev"


def load(config: Config) -> list[Problem]:
    """Return the problems; level is the school grade, subject the number of steps."""
    return load_cmath(config, "cmath_dev", "validation", ("answer", "golden"), 600, "cmath")
