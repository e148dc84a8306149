"""The generated problems: right, repeatable, and truly held out."""

from __future__ import annotations

import pytest

from data_prep.errors import UserError
from data_prep.sources.embedded import FAMILIES, Config, read
from verifiers import verify


@pytest.fixture(scope="module")
def problems():
    return list(read(Config(train=6000, validation=100, test=300), seed=3))


def test_a_seed_decides_every_problem(problems):
    config = Config(train=6000, validation=100, test=300)
    assert list(read(config, 3)) == problems
    assert list(read(config, 4)) != problems


def test_no_worked_solution_is_on_two_sides(problems):
    """Stronger than distinct questions: a test problem in another family's words is a leak."""
    worked = {
        split: {p.solutions["worked"] for p in problems if p.split == split}
        for split in ("train", "validation", "test")
    }
    assert not worked["train"] & worked["test"]
    assert not worked["train"] & worked["validation"]
    assert not worked["validation"] & worked["test"]
    assert len(worked["test"]) == 300


def test_both_styles_reach_the_gold_and_every_family_and_level_comes(problems):
    for problem in problems[::20]:
        for text in problem.solutions.values():
            assert verify(problem.answer, text).is_correct
    assert {p.subject for p in problems} == set(FAMILIES)
    assert {p.level for p in problems} == {"1", "2", "3"}


def test_the_steps_are_true(problems):
    """Every step that is plain arithmetic, worked out again."""
    checked = 0
    for problem in problems:
        for step in problem.solutions["worked"].split("\n")[:-1]:
            left, right = step.split("=")
            if "frac" in step:
                continue
            assert verify(right, f"\\boxed{{{left}}}").is_correct, step
            checked += 1
        if checked > 2000:
            break
    assert checked > 2000


def test_more_problems_than_there_are_is_said():
    config = Config(train=1, validation=0, test=5000, families={"percent": 1.0}, levels=(1, 0, 0))
    with pytest.raises(UserError, match="distinct problems exist"):
        list(read(config, 1))
