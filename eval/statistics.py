"""Intervals and tests: questions are what was drawn, so questions are what is resampled.

The n samples of one question are not independent of each other; pooling them as if they were
makes intervals too narrow by up to √n. Every function here therefore takes one number a
question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# Counts held at once while resampling: 5,000 questions × 400 resamples in 16 MB.
_BLOCK = 2_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        n: Number of questions behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | None]:
        """Return the four numbers as `report.json` holds them; None for NaN."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {k: v if math.isfinite(v) else None for k, v in ends.items()} | {"n": self.n}


def _resamples(questions: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks of counts, shape [block, Q]: how often each question was drawn."""
    generator = np.random.default_rng(seed)
    chances = np.full(questions, 1.0 / questions)
    block = max(1, min(resamples, _BLOCK // questions))
    for start in range(0, resamples, block):
        yield generator.multinomial(questions, chances, size=min(block, resamples - start))


def bootstrap_sums(
    columns: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """Return statistics of sums over questions with percentile intervals, clustered by question.

    Args:
        columns: One number a column and question, shape [C, Q].
        statistic: Takes sums over questions, shape [B, C], and returns shape [B, M]. NaN where
            a resample cannot tell (an empty denominator); such resamples are left out.
        resamples: Number of resampled sets of questions.
        seed: Seed of the resampling.
        level: Coverage.

    Returns:
        M intervals; NaN where the statistic of all questions is.
    """
    questions = columns.shape[1]
    whole = statistic(columns.sum(axis=1)[None])[0]
    drawn = np.concatenate(
        [statistic(counts @ columns.T) for counts in _resamples(questions, resamples, seed)]
    )
    tail = (1.0 - level) / 2.0
    intervals = []
    for m, value in enumerate(whole):
        usable = drawn[np.isfinite(drawn[:, m]), m]
        if not math.isfinite(value) or not len(usable):
            intervals.append(Interval(math.nan, math.nan, math.nan, questions))
            continue
        low, high = np.quantile(usable, [tail, 1.0 - tail])
        intervals.append(Interval(float(value), float(low), float(high), questions))
    return intervals


def bootstrap_means(
    values: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> list[Interval]:
    """Return the mean of each metric with its percentile interval, clustered by question.

    All metrics are read off the same resampled questions.

    Args:
        values: One number a metric and question, shape [M, Q].
        resamples: Number of resampled sets of questions.
        seed: Seed of the resampling.
        level: Coverage.

    Returns:
        M intervals.
    """
    questions = values.shape[1]
    return bootstrap_sums(
        values, lambda sums: sums / questions, resamples=resamples, seed=seed, level=level
    )


def bootstrap_ratios(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """Return Σ numerator / Σ denominator with percentile intervals, clustered by question.

    A share among samples of one kind (the accuracy of worked samples, say) has a denominator
    that varies with the questions drawn; where it is 0 for all questions, the value is NaN.

    Args:
        numerators: Shape [M, Q].
        denominators: Shape [M, Q].
        resamples: Number of resampled sets of questions.
        seed: Seed of the resampling.
        level: Coverage.

    Returns:
        M intervals.
    """
    metrics = numerators.shape[0]

    def divide(sums: np.ndarray) -> np.ndarray:
        top, bottom = sums[:, :metrics], sums[:, metrics:]
        return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)

    columns = np.concatenate([numerators, denominators]).astype(np.float64)
    return bootstrap_sums(columns, divide, resamples=resamples, seed=seed, level=level)


def widen_constant(interval: Interval, *, level: float = 0.95) -> Interval:
    """Return an honest interval for a proportion that is 0 or 1 on every question.

    Resampling equal values gives an interval of width 0. What Q questions without a single
    success can exclude is a rate above 1 − (α/2)^(1/Q) (Clopper and Pearson 1934), and that is
    what this returns; any other interval is returned as it is.
    """
    if interval.low != interval.high or interval.value not in (0.0, 1.0):
        return interval
    reach = ((1.0 - level) / 2.0) ** (1.0 / interval.n)
    if interval.value == 0.0:
        return Interval(0.0, 0.0, 1.0 - reach, interval.n)
    return Interval(1.0, reach, 1.0, interval.n)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """B − A on the same questions.

    Attributes:
        difference: Mean of the differences, with its interval.
        p_value: Two-sided, from the bootstrap distribution moved to zero.
        smallest: Smallest true difference that such a set shows with 80 % power at 5 %.
    """

    difference: Interval
    p_value: float
    smallest: float


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> PairedDifference:
    """Return the paired bootstrap of B − A, clustered by question.

    The smallest detectable difference is (z₀.₉₇₅ + z₀.₈) · s / √Q with s the standard
    deviation of the per-question differences. Where all are equal, s is 1 / √Q, that of a single
    question which changed: equal columns must not claim that they would show any difference.

    Args:
        a: One number a question, shape [Q].
        b: The same questions in the same order, shape [Q].
        resamples: Number of resampled sets of questions.
        seed: Seed of the resampling.
        level: Coverage.
    """
    delta = b - a
    questions = len(delta)
    means = np.concatenate(
        [counts @ delta / questions for counts in _resamples(questions, resamples, seed)]
    )
    value = float(delta.mean())
    tail = (1.0 - level) / 2.0
    low, high = (float(x) for x in np.quantile(means, [tail, 1.0 - tail]))
    # Rounding must not make a tie of resamples that equal the observed value.
    extreme = np.abs(means - value) >= abs(value) - 1e-12
    p_value = (1 + int(extreme.sum())) / (1 + len(means))
    spread = float(delta.std(ddof=1)) if questions > 1 else 0.0
    spread = spread or 1.0 / math.sqrt(questions)
    normal = NormalDist()
    smallest = (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * spread / math.sqrt(questions)
    return PairedDifference(Interval(value, low, high, questions), p_value, smallest)


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test on two graded columns of the same questions.

    Attributes:
        gained: Questions wrong under A and right under B.
        lost: Questions right under A and wrong under B.
        p_value: Two-sided exact binomial.
    """

    gained: int
    lost: int
    p_value: float


def mcnemar(a: np.ndarray, b: np.ndarray) -> McNemar:
    """Return McNemar's exact test: under no difference, gained ~ Binomial(gained + lost, ½).

    Args:
        a: Booleans, shape [Q].
        b: Booleans of the same questions, shape [Q].
    """
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return McNemar(gained, lost, min(1.0, 2 * tail / 2**changed))


def holm(p_values: list[float]) -> list[float]:
    """Return Holm's adjusted p-values: valid for any number of comparisons made at once."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
