"""The benchmark of growth: its fits on times with known answers, and a small run of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

WORK = (2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def bench(root) -> ModuleType:
    return imported(root, "bench_growth")


@pytest.fixture(scope="module")
def figures(root) -> ModuleType:
    return imported(root, "growth_figures")


def imported(root: Path, name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "tests" / "benchmarks"))
        return importlib.import_module(name)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_power_law_gives_its_exponent(figures, power):
    found = figures.exponent(WORK, [0.03 * w**power for w in WORK])
    for name in ("exponent", "low", "high", "last"):
        assert found[name] == pytest.approx(power, abs=1e-6)


def test_fixed_cost_lowers_the_exponent_and_a_square_raises_the_last_slope(figures):
    fixed = figures.exponent(WORK, [10.0 + w for w in WORK])
    assert fixed["exponent"] < fixed["last"] < 1.0
    assert fixed["last"] == pytest.approx(math.log2(42 / 26))
    square = figures.exponent(WORK, [w + 0.05 * w**2 for w in WORK])
    assert 1.0 < square["exponent"] < square["last"] < 2.0


def test_the_interval_holds_the_truth_as_often_as_it_says(figures):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = figures.exponent(WORK, [w**1.1 * math.exp(rng.normal(0.0, 0.1)) for w in WORK])
        held += found["low"] <= 1.1 <= found["high"]
    assert 0.92 <= held / 400 <= 0.98


def test_two_points_have_a_slope_and_no_interval(figures):
    found = figures.exponent((1, 2), (1.0, 2.0))
    assert found["exponent"] == pytest.approx(1.0)
    assert math.isnan(found["low"]) and math.isnan(found["high"])


def test_a_small_run_measures_every_point(bench, figures, tmp_path, capsys):
    out, chart = tmp_path / "growth.json", tmp_path / "growth.png"
    words = ["--work", str(tmp_path / "work"), "--quick"]
    bench.main([*words, "--out", str(out), "--chart", str(chart)])
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert {"machine", "cores", "versions", "base", "seconds"} <= set(found)
    for axis in figures.AXES:
        rows = found["points"][axis]
        assert [row["value"] for row in rows] == list(bench.QUICK.values[axis])
        for row in rows:
            point = {**bench.QUICK.base, axis: row["value"]}
            samples = point["prompts"] * point["group"]
            assert len(row["rounds"]) == bench.QUICK.rounds
            for taken in row["rounds"]:
                assert taken["samples"] == samples
                assert taken["tokens"] == samples * point["length"]
                parts = sum(taken[piece]["wall"] for piece in ("generate", "judge", "update"))
                assert 0.0 < parts < taken["step"]["wall"]
        table = found["wall"][axis]
        assert set(table["exponent"]) == set(figures.PIECES)
        seconds, first = table["step_s"][0], rows[0]["rounds"][0]
        assert table["samples_per_s"][0] == pytest.approx(first["samples"] / seconds, rel=1e-3)
        assert "judge" not in found["cpu"][axis]["exponent"]
    assert found["wall"]["verifiers"]["values"] == [1, 2]
    assert chart.read_bytes().startswith(b"\x89PNG")
    for axis in figures.AXES:
        assert f"| {figures.LABELS[axis]} |" in shown.err

    # From the figures alone, the same chart again.
    again = tmp_path / "again.png"
    bench.main(["--redraw", str(out), "--chart", str(again)])
    assert again.read_bytes() == chart.read_bytes()


@pytest.mark.slow
def test_workers_of_ray_sample_the_same_prompts(bench, tmp_path):
    pytest.importorskip("ray")
    plan = dataclasses.replace(bench.QUICK, samplers=(1, 2))
    pipeline = bench.Pipeline(bench.prepare(tmp_path / "work", plan), tmp_path)
    try:
        rows = bench.measure_samplers(pipeline, plan)
    finally:
        pipeline.close()
    assert [row["value"] for row in rows] == [1, 2]
    samples = plan.parts * plan.base["prompts"] * plan.base["group"]
    assert {taken["samples"] for row in rows for taken in row["rounds"]} == {samples}
