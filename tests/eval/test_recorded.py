"""Recorded runs, graded from their raw text by our verifier."""

from __future__ import annotations

import json

import pytest

from data_prep.errors import UserError
from data_prep.jsonl import read_rows
from eval.recorded import grade_recorded, main, read_recorded
from eval.transcripts import answer_text
from pipeline.verify import open_pool


@pytest.fixture(scope="module")
def pool():
    with open_pool({"kind": "boxed"}, 2, 5.0) as opened:
        yield opened


def test_tora_70b_on_gsm8k_gives_its_published_accuracy(real, pool):
    path = real / "recorded_groups/tora-70b-v1.0_gsm8k_greedy.jsonl"
    samples = list(read_recorded(path, "tora"))
    verdicts = grade_recorded(samples, pool)
    accuracy = sum(verdict.is_correct for verdict in verdicts) / len(verdicts)
    assert round(100 * accuracy, 1) == 84.3


def test_gsm8k_model_solutions_agree_with_their_flags(real, pool):
    samples = list(read_recorded(real / "gsm8k/example_model_solutions.jsonl", "gsm8k_solutions"))
    assert len(samples) == 4 * 1319
    verdicts = grade_recorded(samples, pool)
    agreed = [s.correct == v.is_correct for s, v in zip(samples, verdicts, strict=True)]
    assert sum(agreed) / len(agreed) >= 0.995


def test_command_lists_disagreements_and_writes_rows(tmp_path, capsys):
    rows = [
        {
            "idx": 0,
            "gt": "4",
            "code": [r"so \boxed{4}", r"so \boxed{5}"],
            "pred": ["4", "5"],
            "score": [True, True],
        },
    ]
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, graded = tmp_path / "out.jsonl", tmp_path / "rows.jsonl"
    main([str(path), "--format", "qwen", "--output", str(out), "--rows", str(graded)])
    assert "1 of 2 correct, 50.00 %; agrees with the recorded verdict on 50.00 %" in (
        capsys.readouterr().out
    )
    (found,) = [row for _, row in read_rows(out)]
    assert (found["sample_index"], found["extracted"], found["recorded"]) == (1, "5", True)
    assert [row["class"] for _, row in read_rows(graded)] == [0, 1]
    path.write_text('{"gt": "4"}\n')
    with pytest.raises(UserError, match="line 1: no column 'code'"):
        main([str(path), "--format", "tora"])


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        ("```python\nprint(3)\n```\n```output\n3\n```\nIt is \\boxed{3}.", "It is \\boxed{3}."),
        ("```python\nprint(3)\n```\n```output\n2\n3.0\n```\nThree of 80.", "\\boxed{3.0}"),
        ("```python\nx = '\\boxed{9}'\n```\n```output\n7\n```\nSeven.", "\\boxed{7}"),
        ("```python\nf()\n```\n```output\nNameError: f\n```\nThe answer is 5.", "The answer is 5."),
        ("no program, the answer is 5", "no program, the answer is 5"),
    ],
)
def test_answer_of_a_transcript(transcript, expected):
    assert answer_text(transcript).strip() == expected
