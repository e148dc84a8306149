"""The run's own held-out problems, which `data_prep.build` wrote to `data/test.jsonl`."""

from __future__ import annotations

from data_prep.errors import UserError
from data_prep.schema import Problem, read_problems
from eval.suites import SuiteConfig


class Config(SuiteConfig):
    """`path` is a `test.jsonl` of a data stage; `eval.run` finds that of the model's run."""

    kind: str = "embedded"


def load(config: Config) -> list[Problem]:
    """Return the problems of the data stage.

    Raises:
        UserError: There is no path, or a row is not one of `data_prep.build`.
    """
    if not config.path:
        raise UserError(
            "suite 'embedded'",
            "no file of problems",
            "the test.jsonl of a run's data stage",
            "give one: --suites embedded=RUN/data/test.jsonl",
        )
    return list(read_problems(config.path))
