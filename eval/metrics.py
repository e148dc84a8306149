"""Metrics of one question's n samples: exact expectations, no sampling, no estimate.

Every function takes what was recorded of one question and returns a number in [0, 1]; a
suite's figure is the mean over its questions (see `eval.figures`), and its interval comes
from resampling questions (see `eval.statistics`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Beyond this C(n, n/2) nears the largest float64.
MOST_SAMPLES = 1000


def average(correct: Sequence[bool]) -> float:
    """Return avg@n: the share of correct samples.

    Args:
        correct: One verdict a sample, shape [n].
    """
    return sum(correct) / len(correct)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased Pass@k: the chance that k of the n samples hold a correct one.

        Pass@k = 1 − C(n−c, k) / C(n, k)

    Args:
        n: Number of samples.
        c: Number of correct ones among them.
        k: Number drawn without replacement, 1 ≤ k ≤ n.

    Raises:
        ValueError: k or c is out of range.

    Source: methods.md section 10 (Chen et al. 2021, equation 1).
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"1 ≤ k ≤ n and 0 ≤ c ≤ n are expected, found n={n}, c={c}, k={k}")
    # Exact integers: one rounding, in the division.
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True, slots=True)
class Majority:
    """Maj@k of one question over all size-k subsets of its samples.

    Attributes:
        expected: The mean, ties split evenly.
        strict: Every tie breaks against us: all tied classes must be correct.
        oracle: Every tie breaks for us: one correct class among the tied is enough.
    """

    expected: float
    strict: float
    oracle: float


def majority_at_k(
    classes: Sequence[int | str | None], correct: Sequence[bool], ks: Sequence[int]
) -> list[Majority]:
    """Return Maj@k for several k: the exact expectation over all size-k subsets.

    A subset's vote goes to the class with most members in it. A sample without an answer
    (class None) is drawn like any other but never votes; a subset without a vote scores 0.
    Where r classes tie, each wins with chance 1/r. A class scores the share of its samples
    that are correct (1 or 0, unless the verdict depends on more than the answer); for
    `strict` it is correct when all of them are, for `oracle` when one is.

    The counts of a subset follow the multivariate hypergeometric distribution, so with class
    sizes c_j, b samples without an answer, and f_c,t(x) = Σ_{i<t} C(c, i) xⁱ,

        E = 1/C(n, k) · Σ_t [xᵏ] (1+x)ᵇ · Σ_{tied sets W}
                (mean score of W) · Π_{j∈W} C(c_j, t) xᵗ · Π_{j∉W} f_{c_j,t}(x)

    summed over W by a table of (number tied, degree), never by enumeration.

    Args:
        classes: Equivalence class of each sample's answer, None without one; shape [n].
        correct: Verdict of each sample, shape [n].
        ks: Sizes of the subsets, each 1 ≤ k ≤ n.

    Returns:
        One `Majority` a k, in order.

    Raises:
        ValueError: The lengths differ, a k is out of range, or n is above 1000.

    Source: methods.md section 10.
    """
    n = len(classes)
    if len(correct) != n:
        raise ValueError(f"{n} classes and {len(correct)} verdicts")
    if n > MOST_SAMPLES:
        raise ValueError(f"at most {MOST_SAMPLES} samples a question, found {n}")
    if any(not 1 <= k <= n for k in ks):
        raise ValueError(f"1 ≤ k ≤ n = {n} is expected, found {list(ks)}")
    sizes: Counter[int | str] = Counter()
    right: Counter[int | str] = Counter()
    for name, verdict in zip(classes, correct, strict=True):
        if name is not None:
            sizes[name] += 1
            right[name] += bool(verdict)
    # Only sizes and scores matter, so equal questions share one computation.
    shape = tuple(sorted(Counter((sizes[name], right[name]) for name in sizes).items()))
    table = _majorities(n, shape, max(ks, default=1))
    return [table[k - 1] for k in ks]


def majority_first(classes: Sequence[int | str | None], correct: Sequence[bool], k: int) -> float:
    """Return the first-K Maj@k that published numbers often mean.

    The first k samples vote; among tied classes the one that appeared first wins, and its
    first sample's verdict counts. Depends on the order of the samples; for comparison only.
    """
    counts: Counter[int | str] = Counter()
    verdicts: dict[int | str, bool] = {}
    for name, verdict in list(zip(classes, correct, strict=True))[:k]:
        if name is not None:
            counts[name] += 1
            verdicts.setdefault(name, bool(verdict))
    # `max` keeps the first of equals, and a Counter keeps the order of appearance.
    return float(verdicts[max(counts, key=counts.__getitem__)]) if counts else 0.0


def best_of_k(correct: Sequence[bool], scores: Sequence[float], k: int) -> float:
    """Return best-of-K under a reward model: exact over all size-k subsets.

    The sample with the highest score is taken; samples that tie are taken with equal chance,
    so a tied block scores the mean of its verdicts.

        E = Σ_blocks (mean verdict) · [C(at or below, k) − C(below, k)] / C(n, k)

    Args:
        correct: Verdicts, shape [n].
        scores: Reward model scores, higher is better, shape [n].
        k: Size of the subsets.
    """
    n = len(correct)
    blocks: dict[float, list[bool]] = {}
    for score, verdict in zip(scores, correct, strict=True):
        blocks.setdefault(score, []).append(bool(verdict))
    total, below = 0.0, 0
    for score in sorted(blocks):
        reached = below + len(blocks[score])
        chance = (math.comb(reached, k) - math.comb(below, k)) / math.comb(n, k)
        total += chance * average(blocks[score])
        below = reached
    return total


def weighted_vote(
    classes: Sequence[int | str | None], correct: Sequence[bool], weights: Sequence[float]
) -> float:
    """Return the vote of all samples in which each counts with its weight, ties split evenly.

    Args:
        classes: Equivalence classes, None for no answer; shape [n].
        correct: Verdicts, shape [n].
        weights: Weight of each vote, positive, shape [n]; scores that may be negative belong
            through `softmax` first.
    """
    weight: dict[int | str, float] = {}
    members: dict[int | str, list[bool]] = {}
    for name, verdict, value in zip(classes, correct, weights, strict=True):
        if name is not None:
            weight[name] = weight.get(name, 0.0) + value
            members.setdefault(name, []).append(bool(verdict))
    if not weight:
        return 0.0
    most = max(weight.values())
    winners = [average(members[name]) for name in weight if weight[name] == most]
    return sum(winners) / len(winners)


def softmax(scores: Sequence[float]) -> list[float]:
    """Return positive weights that add up to 1, from scores of any sign.

    A Bradley–Terry model knows scores up to a constant a question; this is the function of them
    that does not change with it.
    """
    shifted = np.exp(np.asarray(scores, dtype=np.float64) - max(scores))
    return [float(value) for value in shifted / shifted.sum()]


Shape = tuple[tuple[tuple[int, int], int], ...]


@lru_cache(maxsize=200_000)
def _majorities(n: int, shape: Shape, most: int) -> tuple[Majority, ...]:
    """Return Maj@k for k = 1 … most of a question with this multiset of (size, right) classes."""
    expected = np.zeros(most + 1)
    strict, lost = np.zeros(most + 1), np.zeros(most + 1)
    blanks = n - sum(size * times for (size, _), times in shape)
    largest = max((size for (size, _), _ in shape), default=0)
    for t in range(1, min(largest, most) + 1):
        if any(right for (size, right), _ in shape if size >= t):
            expected += _split_ties(shape, blanks, t, most)
        below = _all_within(shape, blanks, t - 1, t - 1, t - 1, most)
        strict += _all_within(shape, blanks, t, t - 1, t - 1, most) - below
        lost += _all_within(shape, blanks, t - 1, t - 1, t, most) - below
    silent = _binomials(blanks, most)
    result = []
    for k in range(1, most + 1):
        subsets = math.comb(n, k)
        mean = _unit(expected[k] / subsets)
        # The bounds come by other sums; rounding must not let them cross the mean.
        low = min(mean, _unit(strict[k] / subsets))
        high = max(mean, _unit(1.0 - (lost[k] + silent[k]) / subsets))
        result.append(Majority(expected=mean, strict=low, oracle=high))
    return tuple(result)


def _split_ties(shape: Shape, blanks: int, t: int, most: int) -> np.ndarray:
    """Return, by subset size, the summed score of the subsets whose largest class has t.

    ways[r, d] counts the choices of d samples with r classes at exactly t and none above;
    scores[r, d] sums over them the scores of those r classes.
    """
    deepest = most // t
    small = blanks + sum(size * times for (size, _), times in shape if size < t)
    ways = np.zeros((deepest + 1, most + 1))
    scores = np.zeros_like(ways)
    ways[0] = _binomials(small, most)
    tied_so_far = 0
    for (size, right), times in shape:
        if size < t:
            continue
        new_ways, new_scores = np.zeros_like(ways), np.zeros_like(scores)
        for tied in range(min(times, deepest) + 1):
            factor = math.comb(times, tied) * float(math.comb(size, t)) ** tied
            rest = _toeplitz(size, t, times - tied, most)
            rows = min(tied_so_far, deepest - tied) + 1
            shift = tied * t
            moved = (factor * ways[:rows] @ rest)[:, : most + 1 - shift]
            gained = (factor * scores[:rows] @ rest)[:, : most + 1 - shift]
            new_ways[tied : tied + rows, shift:] += moved
            new_scores[tied : tied + rows, shift:] += gained + tied * (right / size) * moved
        ways, scores = new_ways, new_scores
        tied_so_far = min(tied_so_far + times, deepest)
    counts = np.arange(1, deepest + 1)[:, None]
    return (scores[1:] / counts).sum(axis=0)


def _all_within(
    shape: Shape, blanks: int, good: int, mixed: int, bad: int, most: int
) -> np.ndarray:
    """Return, by subset size, the number of subsets whose classes keep below these counts.

    Args:
        shape: Classes.
        blanks: Samples without an answer, unlimited.
        good: Most members of a class that is correct throughout.
        mixed: Most members of a class that is partly correct.
        bad: Most members of a class without a correct sample.
        most: Largest subset size.
    """
    limits = [
        (size, times, good if right == size else bad if right == 0 else mixed)
        for (size, right), times in shape
    ]
    free = blanks + sum(size * times for size, times, limit in limits if size <= limit)
    row = _binomials(free, most)
    for size, times, limit in limits:
        if size > limit:
            row = row @ _toeplitz(size, limit + 1, times, most)
    return row


@lru_cache(maxsize=4096)
def _binomials(n: int, most: int) -> np.ndarray:
    """Return C(n, 0) … C(n, most)."""
    return np.array([float(math.comb(n, i)) for i in range(most + 1)])


@lru_cache(maxsize=16_384)
def _toeplitz(size: int, t: int, power: int, most: int) -> np.ndarray:
    """Return the matrix that multiplies a row by (Σ_{i<t} C(size, i) xⁱ)^power, cut at `most`."""
    row = np.zeros(most + 1)
    row[0] = 1.0
    factor = _binomials(size, max(most, t))[:t]
    for _ in range(power):
        row = np.convolve(row, factor)[: most + 1]
    matrix = np.zeros((most + 1, most + 1))
    for degree in range(most + 1):
        matrix[degree, degree:] = row[: most + 1 - degree]
    return matrix


def _unit(value: float) -> float:
    """Clear the last bits that rounding may leave outside [0, 1]."""
    return float(min(1.0, max(0.0, value)))
