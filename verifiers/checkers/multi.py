"""OpenAI's `multi` grader: several graders and a formula."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..verdict import elapsed_ms
from . import Outcome, Verdict
from ._formula import Formula
from ._grader import Grader, build, check_type, item_of, sample_of

_DEFAULT = {"answer": {"type": "string_check", "operation": "eq"}}


class MultiGrader(Grader):
    """Score: the value of a formula of the graders' scores.

    When one of the graders cannot grade, neither can this one: the verdict is
    `error` and says which.

    Args:
        graders: Graders by name.
        calculate_output: A formula with these names, `+ - * / ^`, brackets and
            min, max, abs, floor, ceil, exp, sqrt, log; parsed, never evaluated as
            code.
        pass_threshold: From where on it passes.
        type: `multi`.
        name: Any name.
    """

    type_name = "multi"
    examples = (
        ("cat", "cat", "correct"),
        ("cat", "dog", "incorrect"),
    )

    def __init__(
        self,
        graders: Mapping[str, Mapping[str, Any]] | None = None,
        calculate_output: str = "answer",
        pass_threshold: float = 0.5,
        type: str | None = None,  # noqa: A002 -- the name in the JSON
        name: str = "multi",
    ) -> None:
        """Build the graders and read the formula.

        Raises:
            ValueError: No graders, one that does not load, or a formula with other
                names or that cannot be read.
        """
        check_type(type, self.type_name)
        graders = _DEFAULT if graders is None else graders
        if not graders:
            raise ValueError("multi: graders is empty, expected at least one")
        self.graders = {key: build(value, f"graders.{key}") for key, value in graders.items()}
        self.formula = Formula(calculate_output, set(self.graders))
        self.pass_threshold, self.name = float(pass_threshold), name

    def grade(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> tuple[float, str | None]:
        """Grade by every grader, then by the formula."""
        scores = {key: grader.grade(item, sample)[0] for key, grader in self.graders.items()}
        shown = ", ".join(f"{key} {score:g}" for key, score in scores.items())
        return self.formula.value(scores), shown

    def check(self, gold: str, text: str) -> Verdict:
        """Grade, naming the part that could not."""
        started = time.perf_counter()
        for key, grader in self.graders.items() if len(self.graders) > 1 else ():
            if grader.needs_endpoint:
                continue
            try:
                grader.grade(item_of(gold), sample_of(text))
            except (ValueError, RuntimeError) as error:
                return Verdict(
                    Outcome.ERROR, rule="multi", ms=elapsed_ms(started), detail=f"{key}: {error}"
                )
        return super().check(gold, text)
