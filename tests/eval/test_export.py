"""Exports hold the report's figures."""

from __future__ import annotations

import csv

import pytest

from data_prep.jsonl import read_json, read_rows
from eval.export import main


def test_csv_and_harness_files_hold_the_same_figures(simulated_run, tmp_path, capsys):
    main(["--run", str(simulated_run), "--output", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 * 2
    with (tmp_path / "figures.csv").open(newline="") as file:
        rows = {
            (r["checkpoint"], r["by"], r["group"], r["metric"]): r for r in csv.DictReader(file)
        }
    stored = read_json(simulated_run / "eval-grpo/embedded/figures.json")
    for metric, figure in stored["figures"].items():
        row = rows["grpo", "", "", metric]
        assert (float(row["value"]), float(row["low"])) == (figure["value"], figure["low"])
    assert ("grpo", "subject", "plain", "avg@8") in rows
    table = read_json(tmp_path / "results_grpo.json")
    result = table["results"]["embedded"]
    greedy = stored["figures"]["greedy"]
    assert result["exact_match,none"] == greedy["value"]
    assert result["exact_match_stderr,none"] == pytest.approx(
        (greedy["value"] * (1 - greedy["value"]) / 240) ** 0.5, rel=0.15
    )
    assert table["n-samples"]["embedded"]["effective"] == 240
    samples = [row for _, row in read_rows(tmp_path / "samples_grpo_embedded.jsonl")]
    assert sum(row["exact_match"] for row in samples) / 240 == pytest.approx(greedy["value"])
