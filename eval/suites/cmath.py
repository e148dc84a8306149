"""CMATH's 1,098 test rows, the set of the DeepSeekMath paper; see `eval.suites._cmath`."""

from __future__ import annotations

from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._cmath import load_cmath

LANGUAGE = "zh"


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's weitianwen/cmath, split test."""

    kind: str = "cmath"


def load(config: Config) -> list[Problem]:
    """Return the problems; level is the school grade, subject the number of steps."""
    return load_cmath(config, "cmath", "test", ("golden",), 1098, "cmath_dev")
