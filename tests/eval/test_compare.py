"""Comparing: clear differences are found, noise is not ordered, files must match."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.jsonl import read_json
from eval.compare import Candidate, compare, main


def candidate(name, rates, seed):
    draws = np.random.default_rng(seed).random((len(rates), 8)) < np.asarray(rates)[:, None]
    ids = [str(i) for i in range(len(rates))]
    return Candidate(name, ids, {"avg@8": draws.mean(axis=1), "greedy": draws[:, 0].astype(float)})


def test_ranks_are_ranges_where_neighbours_cannot_be_told_apart():
    rates = np.random.default_rng(0).beta(2, 2, 400)
    better = np.clip(rates + 0.15, 0, 1)
    result = compare(
        [candidate("a", rates, 1), candidate("b", rates, 2), candidate("c", better, 3)], "avg@8"
    )
    assert {row["name"]: row["rank"] for row in result["ranking"]} == {
        "c": [1, 1],
        "a": [2, 3],
        "b": [2, 3],
    }
    by_pair = {(pair["a"], pair["b"]): pair for pair in result["pairs"]}
    assert not by_pair["a", "b"]["distinguishable"]
    assert by_pair["a", "c"]["distinguishable"]
    assert by_pair["a", "b"]["smallest_detectable"] > abs(by_pair["a", "b"]["difference"]["value"])


def test_equal_models_are_rarely_ordered():
    """Under no difference at most about 5 % of comparisons may order them."""
    ordered = 0
    for seed in range(120):
        rates = np.random.default_rng(seed).beta(2, 2, 80)
        result = compare(
            [candidate("a", rates, 1000 + seed), candidate("b", rates, 2000 + seed)],
            "avg@8",
            resamples=400,
            seed=seed,
        )
        ordered += result["pairs"][0]["distinguishable"]
    assert ordered <= 13  # 95 % upper bound of a binomial with p = 0.05 is 10


def test_simulated_checkpoints(simulated_run, tmp_path, capsys):
    main(
        [
            str(simulated_run / "eval-sft"),
            str(simulated_run / "eval-grpo"),
            "--output",
            str(tmp_path / "c.json"),
        ]
    )
    result = read_json(tmp_path / "c.json")["embedded"]
    assert [row["name"] for row in result["ranking"]] == ["grpo", "sft"]
    pair = result["pairs"][0]
    figures = {
        c: read_json(simulated_run / f"eval-{c}/embedded/figures.json")["figures"]
        for c in ("sft", "grpo")
    }
    expected = figures["grpo"]["avg@8"]["value"] - figures["sft"]["avg@8"]["value"]
    assert pair["difference"]["value"] == pytest.approx(expected)
    assert len(pair["gained"]) == pair["mcnemar"]["gained"] > 100
    assert len(pair["lost"]) == pair["mcnemar"]["lost"]
    printed = capsys.readouterr().out
    assert "they differ" in printed and "gained: sum-" in printed


def test_other_questions_are_an_error_unless_common(tmp_path, capsys):
    def rows(name, ids):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps(
                    {"problem_id": i, "sample_index": 0, "answer": "1", "correct": i % 2 == 0}
                )
                + "\n"
                for i in ids
            )
        )
        return str(path)

    a, b = rows("a", range(10)), rows("b", range(5, 15))
    with pytest.raises(UserError, match="5 in common"):
        main([a, b])
    main([a, b, "--common"])
    assert "on 5 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no 'pass@9'"):
        main([a, b, "--common", "--metric", "pass@9"])
    with pytest.raises(UserError, match="neither an evaluation's folder"):
        main([a, str(tmp_path)])
