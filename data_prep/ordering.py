"""The order of supervised rows: phases, each with its own blend of solution styles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pydantic import Field, field_validator

from data_prep.config import Config
from data_prep.errors import UserError
from data_prep.schema import Problem


class Phase(Config):
    """A stretch of supervised training.

    Attributes:
        share: Its part of the rows, relative to the other phases'.
        styles: Weight of each solution style; a problem draws among the styles that it has.
    """

    share: float = Field(gt=0.0)
    styles: dict[str, float]

    @field_validator("styles")
    @classmethod
    def _positive(cls, styles: dict[str, float]) -> dict[str, float]:
        if not styles or min(styles.values()) <= 0:
            raise ValueError("positive weights for at least one style are expected")
        return styles


class Draw(NamedTuple):
    """One row: which problem, which of its solutions, in which phase (0 without phases)."""

    problem: int
    style: str
    phase: int


def training_order(
    problems: Sequence[Problem], rows: int, phases: Sequence[Phase], seed: int
) -> list[Draw]:
    """Return the rows in training order.

    Within a phase the problems follow a seeded permutation, a new one each time round; the style
    is drawn by weight among those that the problem has. A problem with a single style uses it.

    Args:
        problems: Problems with at least one solution each.
        rows: Number of rows; 0 takes every (problem, style) once, in a seeded permutation.
        phases: In order; none is one phase with all styles alike.
        seed: Decides permutations and styles.

    Raises:
        UserError: A phase names no style that one of the problems has.
    """
    rng = random.Random(f"{seed}/order")  # noqa: S311 - an order, not a secret
    if rows == 0 or not problems:
        draws = [Draw(i, style, 0) for i, p in enumerate(problems) for style in p.solutions]
        rng.shuffle(draws)
        return draws
    if not phases:
        phases = [Phase(share=1.0, styles={s: 1.0 for p in problems for s in p.solutions})]
    draws = []
    for number, (phase, count) in enumerate(zip(phases, _counts(rows, phases), strict=True)):
        order: list[int] = []
        for _ in range(count):
            if not order:
                order = list(range(len(problems)))
                rng.shuffle(order)
            index = order.pop()
            draws.append(Draw(index, _style(problems[index], phase, number, rng), number))
    return draws


def _counts(rows: int, phases: Sequence[Phase]) -> list[int]:
    """Share `rows` out exactly: each phase ends at its rounded cumulative share."""
    total = sum(phase.share for phase in phases)
    ends, reached = [0], 0.0
    for phase in phases:
        reached += phase.share
        ends.append(round(rows * reached / total))
    return [stop - start for start, stop in pairwise(ends)]


def _style(problem: Problem, phase: Phase, number: int, rng: random.Random) -> str:
    if len(problem.solutions) == 1:
        return next(iter(problem.solutions))
    names = [style for style in phase.styles if style in problem.solutions]
    if not names:
        raise UserError(
            f"data.phases, entry {number + 1}, styles",
            f"{', '.join(phase.styles)}: none is a style of problem {problem.id!r}",
            f"at least one of {', '.join(problem.solutions)}",
            "mend the names of the styles",
        )
    return rng.choices(names, [phase.styles[name] for name in names])[0]
