"""Intervals: known values, coverage in simulation, and clustering by question."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.statistics import (
    Interval,
    bootstrap_means,
    bootstrap_ratios,
    holm,
    mcnemar,
    paired_difference,
    widen_constant,
)


def test_interval_equals_the_normal_one_for_many_questions():
    values = np.random.default_rng(0).normal(0.5, 0.2, size=(1, 4000))
    got = bootstrap_means(values, resamples=4000, seed=1)[0]
    half = 1.96 * values.std() / math.sqrt(4000)
    assert got.value == pytest.approx(values.mean())
    assert got.high - got.value == pytest.approx(half, rel=0.08)
    assert got.value - got.low == pytest.approx(half, rel=0.08)


def test_intervals_cover_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        rates = generator.beta(2, 2, size=120)
        samples = generator.random((120, 8)) < rates[:, None]
        got = bootstrap_means(samples.mean(axis=1)[None], resamples=400, seed=trial)[0]
        covered += got.low <= 0.5 <= got.high
    assert 0.91 <= covered / 400 <= 0.98


def test_eight_equal_samples_are_worth_one():
    """Clustering: repeating each answer eight times must not narrow the interval."""
    single = (np.random.default_rng(0).random(300) < 0.4).astype(float)
    repeated = np.repeat(single[:, None], 8, axis=1).mean(axis=1)
    assert bootstrap_means(single[None], seed=5) == bootstrap_means(repeated[None], seed=5)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).random((2, 50))
    assert bootstrap_means(values, seed=1) == bootstrap_means(values, seed=1)
    assert bootstrap_means(values, seed=1) != bootstrap_means(values, seed=2)


def test_ratios_divide_sums_not_means_of_ratios():
    got = bootstrap_ratios(np.array([[1.0, 3.0]]), np.array([[1.0, 9.0]]), seed=0)[0]
    assert got.value == pytest.approx(0.4)
    empty = bootstrap_ratios(np.zeros((1, 3)), np.zeros((1, 3)))[0]
    assert math.isnan(empty.value)


def test_a_constant_proportion_gets_the_clopper_pearson_bound():
    got = widen_constant(Interval(0.0, 0.0, 0.0, 100))
    assert (got.low, got.high) == (0.0, pytest.approx(0.0362, abs=1e-4))
    assert widen_constant(Interval(1.0, 1.0, 1.0, 100)).low == pytest.approx(0.9638, abs=1e-4)
    other = Interval(0.5, 0.4, 0.6, 100)
    assert widen_constant(other) is other


def test_paired_difference_sees_what_unpaired_intervals_cannot():
    generator = np.random.default_rng(0)
    a = generator.random(400)
    b = a + 0.02 + generator.normal(0, 0.02, 400)
    got = paired_difference(a, b, seed=0)
    assert got.difference.low > 0.015
    assert got.p_value < 0.01
    assert got.smallest == pytest.approx(2.8016 * (b - a).std(ddof=1) / 20, rel=1e-3)
    same = paired_difference(a, a, seed=0)
    assert (same.p_value, same.difference.value) == (1.0, 0.0)
    # Equal columns show no more than one changed question in 400 would.
    assert same.smallest == pytest.approx(2.8016 / 400, rel=1e-3)


def test_mcnemar_by_hand():
    a = np.array([True] * 50 + [False] * 10)
    b = np.array([True] * 49 + [False] + [True] * 9 + [False])
    got = mcnemar(a, b)
    assert (got.gained, got.lost) == (9, 1)
    assert got.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(a, a).p_value == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
