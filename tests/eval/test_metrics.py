"""Metrics against brute force over all subsets, and against numbers worked by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from fractions import Fraction

import pytest

from eval import metrics
from eval.metrics import (
    MOST_SAMPLES,
    Majority,
    average,
    best_of_k,
    majority_at_k,
    majority_first,
    pass_at_k,
    softmax,
    weighted_vote,
)


@pytest.fixture(autouse=True)
def computed_afresh():
    """Every test computes; none reads what an earlier one left in a cache."""
    for cached in (metrics._majorities, metrics._binomials, metrics._toeplitz):
        cached.cache_clear()


def brute_majority(classes, correct, k):
    """Enumerate every subset, with exact fractions."""
    expected, strict, oracle, subsets = Fraction(0), 0, 0, 0
    for chosen in itertools.combinations(range(len(classes)), k):
        subsets += 1
        votes = Counter(classes[i] for i in chosen if classes[i] is not None)
        if not votes:
            continue
        winners = [name for name in votes if votes[name] == max(votes.values())]
        for name in winners:
            inside = [correct[i] for i in chosen if classes[i] == name]
            expected += Fraction(sum(inside), len(inside)) / len(winners)
        everywhere = [[c for n, c in zip(classes, correct, strict=True) if n == w] for w in winners]
        strict += all(all(flags) for flags in everywhere)
        oracle += any(any(flags) for flags in everywhere)
    return float(expected / subsets), strict / subsets, oracle / subsets


def questions(seed, count):
    rng = random.Random(seed)
    for index in range(count):
        n = rng.randint(1, 9)
        classes = [rng.choice([None, "a", "b", "c", "d", "e"]) for _ in range(n)]
        if index % 3 == 0:  # one right class
            correct = [name == "a" for name in classes]
        elif index % 3 == 1:  # two right classes, as with string classes
            correct = [name in ("a", "b") for name in classes]
        else:  # a verdict that is not a function of the class (a time-out, say)
            correct = [name is not None and rng.random() < 0.4 for name in classes]
        yield classes, correct


def test_majority_equals_brute_force_over_all_subsets():
    for classes, correct in questions(1, 240):
        ks = list(range(1, len(classes) + 1))
        for k, got in zip(ks, majority_at_k(classes, correct, ks), strict=True):
            expected, strict, oracle = brute_majority(classes, correct, k)
            assert got.expected == pytest.approx(expected, abs=1e-12), (classes, correct, k)
            assert got.strict == pytest.approx(strict, abs=1e-12), (classes, correct, k)
            assert got.oracle == pytest.approx(oracle, abs=1e-12), (classes, correct, k)


def test_pass_and_best_of_k_equal_brute_force():
    rng = random.Random(2)
    for classes, correct in questions(3, 90):
        n = len(classes)
        scores = [rng.choice([0.1, 0.5, 0.9]) for _ in classes]  # ties are common
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            hit = sum(any(correct[i] for i in s) for s in subsets) / len(subsets)
            assert pass_at_k(n, sum(correct), k) == pytest.approx(hit, abs=1e-12)
            best = 0.0
            for s in subsets:
                top = max(scores[i] for i in s)
                best += average([correct[i] for i in s if scores[i] == top]) / len(subsets)
            assert best_of_k(correct, scores, k) == pytest.approx(best, abs=1e-12)


def test_majority_by_hand():
    # Two right, one wrong, one silent; pairs: rr (1), rw twice (½ each), r- twice (1), w- (0).
    got = majority_at_k(["x", "x", "y", None], [True, True, False, False], [2])[0]
    assert got.expected == pytest.approx((1 + 2 * 0.5 + 2 * 1 + 0) / 6)
    assert (got.strict, got.oracle) == (pytest.approx(3 / 6), pytest.approx(5 / 6))


def test_a_silent_sample_never_votes_and_all_silent_is_zero():
    assert majority_at_k([None, None], [False, False], [1, 2]) == [Majority(0, 0, 0)] * 2
    # One vote against three silences wins.
    assert majority_at_k(["x", None, None, None], [True] + [False] * 3, [4])[0].expected == 1.0


def test_large_groups_stay_exact():
    """At n = 64 float tables agree with exact rational arithmetic of the two-class case."""
    right, wrong = 37, 27
    classes = ["r"] * right + ["w"] * wrong
    correct = [True] * right + [False] * wrong
    ks = [1, 2, 7, 8, 31, 32, 63, 64]
    for k, got in zip(ks, majority_at_k(classes, correct, ks), strict=True):
        exact = Fraction(0)
        for r in range(max(0, k - wrong), min(k, right) + 1):
            ways = Fraction(math.comb(right, r) * math.comb(wrong, k - r), math.comb(64, k))
            exact += ways if 2 * r > k else ways / 2 if 2 * r == k else 0
        assert got.expected == pytest.approx(float(exact), abs=1e-12)
        assert got.strict <= got.expected <= got.oracle


def test_many_singletons_split_one_vote_evenly():
    """All answers differ: every subset ties throughout, so the vote is a draw at random."""
    classes = list(range(64))
    correct = [index < 5 for index in range(64)]
    for got in majority_at_k(classes, correct, [1, 2, 16, 64]):
        assert got.expected == pytest.approx(5 / 64, abs=1e-12)


def test_first_k_takes_the_class_that_appeared_first():
    classes, correct = ["w", "r", "r", "w"], [False, True, True, False]
    assert majority_first(classes, correct, 1) == 0.0
    assert majority_first(classes, correct, 3) == 1.0
    assert majority_first(classes, correct, 4) == 0.0
    assert majority_first([None, None], [False, False], 2) == 0.0


def test_weighted_vote():
    classes, correct = ["w", "w", "r", None], [False, False, True, False]
    assert weighted_vote(classes, correct, [0.1, 0.1, 0.9, 5.0]) == 1.0
    assert weighted_vote(classes, correct, [0.5, 0.5, 1.0, 5.0]) == 0.5
    assert weighted_vote([None], [False], [1.0]) == 0.0


def test_softmax_by_hand_and_its_invariance():
    assert softmax([0.0, math.log(3.0)]) == pytest.approx([0.25, 0.75])
    assert softmax([5.0]) == [1.0]
    # Adding a constant changes nothing, and no score is too large or too small.
    scores = [-2.0, 0.5, 1.0]
    shifted = softmax([1000.0 + s for s in scores])
    assert shifted == pytest.approx(softmax(scores))
    assert softmax([-1e4, 0.0]) == pytest.approx([0.0, 1.0])
    assert sum(softmax([0.1] * 7)) == pytest.approx(1.0)
    total = sum(math.exp(s) for s in scores)
    assert softmax(scores) == pytest.approx([math.exp(s) / total for s in scores])
    assert all(type(value) is float for value in softmax([1.0, 2.0]))


def test_a_vote_that_no_one_wins_outright():
    """Ties split evenly, also where a class is only partly right, and weights add up."""
    classes, correct = ["a", "a", "b", "c"], [True, False, True, False]
    # a: 1 (half right), b: 1 (right), c: ½.
    assert weighted_vote(classes, correct, [0.5, 0.5, 1.0, 0.5]) == 0.75
    assert weighted_vote(classes, correct, [0.5, 0.5, 0.5, 0.5]) == 0.5
    assert weighted_vote([None, "x"], [False, True], [9.0, 0.1]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        weighted_vote(classes, correct, [1.0])
    with pytest.raises(ValueError, match="zip"):
        weighted_vote(classes, correct[:3], [1.0] * 4)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"^2 classes and 1 verdicts$"):
        majority_at_k(["a", "b"], [True], [1])
    with pytest.raises(ValueError, match="zip"):
        best_of_k([True], [0.5, 0.1], 1)
    with pytest.raises(ValueError, match="zip"):
        majority_first(["a"], [True, False], 1)
    many = MOST_SAMPLES + 1
    words = f"^at most {MOST_SAMPLES} samples a question, found {many}$"
    with pytest.raises(ValueError, match=words):
        majority_at_k(["a"] * many, [True] * many, [1])
    assert majority_at_k(["a"] * MOST_SAMPLES, [True] * MOST_SAMPLES, [1]) == [Majority(1, 1, 1)]
    assert majority_at_k(["a"], [True], []) == []


def test_the_edges_of_pass_at_k():
    assert (pass_at_k(3, 0, 3), pass_at_k(3, 3, 1), pass_at_k(1, 1, 1)) == (0.0, 1.0, 1.0)
    for c in (-1, 4):
        with pytest.raises(ValueError, match=f"^1 ≤ k ≤ n and .* found n=3, c={c}, k=1$"):
            pass_at_k(3, c, 1)
    assert pass_at_k(1000, 1, 500) == 0.5


def test_the_first_answer_and_the_first_verdict_count():
    """Two of class "a": its first verdict stands for it; a later class needs more votes."""
    assert majority_first(["a", "a", "b"], [True, False, False], 3) == 1.0
    assert majority_first(["a", "a", "b"], [False, True, True], 3) == 0.0
    assert majority_first([None, "b", "a", "a"], [False, True, False, False], 2) == 1.0
    assert majority_first([None, "b", "a", "a"], [False, True, False, False], 4) == 0.0


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match="1 ≤ k ≤ n"):
        majority_at_k(["a"] * 4, [True] * 4, [k])
    with pytest.raises(ValueError, match="1 ≤ k ≤ n"):
        pass_at_k(4, 2, k)


def test_recorded_groups_give_their_known_values(real):
    path = real / "recorded_groups/qwen_math_cot_100.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    groups = [([p or None for p in row["pred"]], row["score"]) for row in rows]

    def mean(values):
        return math.fsum(values) / len(groups)

    four = [majority_at_k(c, s, [4])[0] for c, s in groups]
    eight = [majority_at_k(c, s, [8])[0] for c, s in groups]
    assert mean(average(s) for _, s in groups) == pytest.approx(0.91)
    assert mean(pass_at_k(8, sum(s), 2) for _, s in groups) == pytest.approx(0.932857, abs=1e-6)
    assert mean(pass_at_k(8, sum(s), 4) for _, s in groups) == pytest.approx(0.951)
    assert mean(majority_first(c, s, 4) for c, s in groups) == pytest.approx(0.93)
    assert mean(m.expected for m in four) == pytest.approx(0.920107, abs=1e-6)
    assert mean(m.strict for m in eight) == pytest.approx(0.91)
    assert mean(m.oracle for m in eight) == pytest.approx(0.94)
    for (classes, correct), got in zip(groups, four, strict=True):
        assert got.expected == pytest.approx(brute_majority(classes, correct, 4)[0], abs=1e-12)
