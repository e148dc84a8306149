"""MGSM in English; see `eval.suites._mgsm` for the layouts that are read."""

from __future__ import annotations

from data_prep.schema import Problem
from eval.suites import SuiteConfig
from eval.suites._mgsm import load_mgsm

LANGUAGE = "en"


class Config(SuiteConfig):
    """A local copy by `path`, else the hub's juletxara/mgsm, configuration en."""

    kind: str = "mgsm_en"


def load(config: Config) -> list[Problem]:
    """Return the 250 problems."""
    return load_mgsm(config, LANGUAGE)
