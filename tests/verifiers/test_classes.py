"""Every class of answer, accepted and refused: one row of the two tables is one test."""

from pathlib import Path

import pytest

from verifiers import verify

HERE = Path(__file__).parent


def _rows(name: str) -> list:
    rows, group = [], ""
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]") and "|||" not in line:
            group = line.strip("[]")
        elif line and not line.startswith("#"):
            gold, answer = line.split(" ||| ")
            rows.append(pytest.param(gold, answer, id=f"{group}: {gold} / {answer}"))
    return rows


@pytest.mark.parametrize(("gold", "answer"), _rows("pairs_same.txt"))
def test_the_same_answer_is_accepted(gold: str, answer: str) -> None:
    verdict = verify(gold, f"Therefore it is $\\boxed{{{answer}}}$.")
    assert verdict.is_correct, verdict


@pytest.mark.parametrize(("gold", "answer"), _rows("pairs_different.txt"))
def test_another_answer_is_refused(gold: str, answer: str) -> None:
    verdict = verify(gold, f"Therefore it is $\\boxed{{{answer}}}$.")
    assert not verdict.is_correct, verdict


@pytest.mark.parametrize(("gold", "answer"), _rows("pairs_same.txt"))
def test_acceptance_is_symmetric_but_for_rounding(gold: str, answer: str) -> None:
    there = verify(gold, f"\\boxed{{{answer}}}")
    back = verify(answer, f"\\boxed{{{gold}}}")
    assert there.is_correct == back.is_correct or "rounded" in (there.rule, back.rule), (
        there,
        back,
    )


@pytest.mark.parametrize(("gold", "answer"), _rows("pairs_different.txt"))
def test_refusal_is_symmetric(gold: str, answer: str) -> None:
    back = verify(answer, f"\\boxed{{{gold}}}")
    assert not back.is_correct or back.rule == "rounded", back


@pytest.mark.parametrize(("gold", "text"), _rows("responses_right.txt"))
def test_a_right_completion_is_accepted(gold: str, text: str) -> None:
    verdict = verify(gold, text.replace("⏎", "\n"))
    assert verdict.is_correct, verdict


@pytest.mark.parametrize(("gold", "text"), _rows("responses_wrong.txt"))
def test_a_wrong_completion_is_refused(gold: str, text: str) -> None:
    verdict = verify(gold, text.replace("⏎", "\n"))
    assert not verdict.is_correct, verdict
