"""Means over seeds with Student's t intervals, 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean over seeds with Student's t interval, 95 %."""

    mean: float
    low: float
    high: float

    def text(self, scale: float = 100.0, sign: bool = False) -> str:
        """Return "71.3 [69.0, 73.5]", or with signs "−1.5 [−8.2, +5.3]"."""
        form = "+z.1f" if sign else "z.1f"  # without a zero below zero
        ends = (format(scale * value, form).replace("-", "−") for value in self)
        mean, low, high = ends
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"


def share_over_seeds(values: Sequence[float]) -> Interval:
    """Return the mean of shares and its interval, which ends at 0 and 1 at the latest."""
    mean, low, high = over_seeds(values)
    return Interval(
        mean, *(end if math.isnan(end) else min(max(end, 0.0), 1.0) for end in (low, high))
    )


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the mean and its interval; the ends are NaN for a single seed."""
    from scipy import stats

    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
    reach = float(stats.t.ppf(0.975, count - 1)) * spread
    return Interval(mean, mean - reach, mean + reach)
