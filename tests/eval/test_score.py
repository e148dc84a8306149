"""eval.score: recorded groups to known values, an independent brute force, clear errors."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest

from data_prep.errors import UserError
from data_prep.jsonl import read_json
from eval.score import main


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(path, tmp_path, *more):
    main(["--samples", str(path), "--output", str(tmp_path / "metrics.json"), *more])
    return read_json(tmp_path / "metrics.json")


def qwen_rows(real):
    lines = (real / "recorded_groups/qwen_math_cot_100.jsonl").read_text("utf-8").splitlines()
    return [
        {"problem_id": row["idx"], "sample_index": index, "answer": answer or None, "correct": ok}
        for row in map(json.loads, lines)
        for index, (answer, ok) in enumerate(zip(row["pred"], row["score"], strict=True))
    ]


def test_recorded_qwen_groups(real, tmp_path, capsys):
    path = write(tmp_path / "samples.jsonl", qwen_rows(real))
    got = run(path, tmp_path, "--k", "1,2,4,8", "--symbolic")
    known = {
        "avg@8": 0.91,
        "pass@2": 0.932857,
        "pass@4": 0.951,
        "maj@4_first": 0.93,
        "maj@4": 0.920107,
        "maj@8_strict": 0.91,
        "maj@8_oracle": 0.94,
    }
    for name, value in known.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name
        assert got["intervals"][name]["value"] == got[name]
        assert got["intervals"][name]["n"] == 100
    assert "maj@4" in capsys.readouterr().out
    # What symbolic voting merges is listed, and its votes stand beside those by spelling.
    assert got["maj@8_string"] == pytest.approx(0.925)
    for merge in got["merges"]:
        assert len(set(merge["answers"])) > 1


def test_zeroeval_groups_equal_brute_force(real, tmp_path):
    """Six models' recorded answers as one group, against an enumeration written apart."""
    lines = (real / "recorded_groups/zeroeval_math_l5_answers.jsonl").read_text("utf-8")
    groups = []
    for row in map(json.loads, lines.splitlines()[:120]):
        answers = list(row["answers"].values())[:7]
        groups.append([(a, a is not None and str(a) == str(row["gold"])) for a in answers])
    rows = [
        {"problem_id": p, "sample_index": i, "answer": a, "correct": ok}
        for p, group in enumerate(groups)
        for i, (a, ok) in enumerate(group)
    ]
    got = run(write(tmp_path / "s.jsonl", rows), tmp_path, "--k", "1,3,4,7")
    for k in (1, 3, 4, 7):
        expected = {"pass": [], "maj": [], "strict": [], "oracle": []}
        for group in groups:
            subsets = list(itertools.combinations(group, k))
            scores = dict.fromkeys(expected, 0.0)
            for subset in subsets:
                votes = Counter(str(a) for a, _ in subset if a is not None)
                right = {str(a) for a, ok in group if ok}
                winners = [a for a in votes if votes[a] == max(votes.values())]
                scores["pass"] += any(ok for _, ok in subset)
                if winners:
                    scores["maj"] += sum(a in right for a in winners) / len(winners)
                    scores["strict"] += all(a in right for a in winners)
                    scores["oracle"] += any(a in right for a in winners)
            for name in expected:
                expected[name].append(scores[name] / len(subsets))
        for name, metric in (
            ("pass", f"pass@{k}"),
            ("maj", f"maj@{k}"),
            ("strict", f"maj@{k}_strict"),
            ("oracle", f"maj@{k}_oracle"),
        ):
            mean = math.fsum(expected[name]) / len(groups)
            assert got[metric] == pytest.approx(mean, abs=1e-12), metric


def test_given_classes_decide_and_order_does_not(tmp_path):
    rows = [
        {"problem_id": "a", "sample_index": 0, "answer": "1/2", "correct": True, "class": 0},
        {"problem_id": "a", "sample_index": 1, "answer": "0.5", "correct": True, "class": 0},
        {"problem_id": "a", "sample_index": 2, "answer": "7", "correct": False, "class": 1},
    ]
    got = run(write(tmp_path / "s.jsonl", rows[::-1]), tmp_path, "--k", "3")
    assert (got["maj@3"], got["maj@3_first"]) == (1.0, 1.0)
    spelled = [{k: v for k, v in row.items() if k != "class"} for row in rows]
    assert run(write(tmp_path / "s.jsonl", spelled), tmp_path, "--k", "3")["maj@3"] == (
        pytest.approx(2 / 3)
    )
    assert run(write(tmp_path / "s.jsonl", spelled), tmp_path, "--symbolic")["maj@2"] == (
        pytest.approx((1 + 0.5 + 0.5) / 3)
    )


def test_reward_scores_add_best_of_k(tmp_path):
    rows = [
        {"problem_id": "a", "sample_index": i, "answer": str(i), "correct": i == 2, "score": s}
        for i, s in enumerate([0.1, 0.2, 0.9])
    ]
    got = run(write(tmp_path / "s.jsonl", rows), tmp_path, "--k", "1,2,3")
    assert got["best@2"] == pytest.approx(2 / 3)
    assert (got["best@3"], got["weighted@3"]) == (1.0, 1.0)


GOOD = {"problem_id": "a", "sample_index": 0, "answer": "1", "correct": True}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{**GOOD, "correct": "yes"}], "line 1: correct is 'yes'"),
        ([{k: v for k, v in GOOD.items() if k != "answer"}], "no column 'answer'"),
        ([GOOD, GOOD], "line 2: sample 0 of problem 'a' comes twice"),
        (
            [GOOD, {**GOOD, "problem_id": "b"}, {**GOOD, "sample_index": 1}],
            "problem 'b' has 1 samples, 'a' has 2",
        ),
        ([{**GOOD, "sample_index": -1}], "sample_index is -1"),
    ],
)
def test_broken_files_are_named(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(write(tmp_path / "s.jsonl", rows), tmp_path, "--k", "1")
    assert not (tmp_path / "metrics.json").exists()


def test_k_above_n_is_refused(tmp_path):
    with pytest.raises(UserError, match="K = 4 with 1 samples a problem"):
        run(write(tmp_path / "s.jsonl", [GOOD]), tmp_path, "--k", "1,4")
