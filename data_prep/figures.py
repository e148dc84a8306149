"""The figures that describe a data stage: counts, lengths, what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.ordering import Draw
from data_prep.rows import TokenisedPairs
from data_prep.schema import Problem

QUANTILES = (0.5, 0.9, 0.99)


def tally(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value occurs, sorted by value."""
    return dict(sorted(Counter(values).items()))


def length_figures(lengths: np.ndarray) -> dict[str, float]:
    """Return minimum, quantiles, mean and maximum of token counts."""
    if not len(lengths):
        return {}
    quantiles = {
        f"p{round(100 * q)}": float(np.quantile(lengths, q, method="higher")) for q in QUANTILES
    }
    return {
        "min": float(lengths.min()),
        **quantiles,
        "mean": round(float(lengths.mean()), 3),
        "max": float(lengths.max()),
    }


def problem_figures(problems: Sequence[Problem]) -> dict[str, Any]:
    """Return problems by source and split, and by source, split and level."""
    names = sorted({problem.source for problem in problems})
    return {
        name: {
            split: {
                "problems": len(chosen),
                "levels": tally(problem.level or "unknown" for problem in chosen),
                "subjects": tally(problem.subject or "unknown" for problem in chosen),
            }
            for split in ("train", "validation", "test")
            if (chosen := [p for p in problems if p.source == name and p.split == split])
        }
        for name in names
    }


def row_figures(
    problems: Sequence[Problem], pairs: TokenisedPairs, draws: Sequence[Draw], order: Sequence[int]
) -> dict[str, Any]:
    """Return the figures of one file of tokenised rows.

    Args:
        problems: The problems that `draws` index.
        pairs: Their tokenised pairs.
        draws: One a row.
        order: Index of each row's pair.
    """
    lengths = pairs.lengths()[list(order)] if order else np.zeros(0, dtype=np.int64)
    answers = np.array([int(mask.sum()) for mask in pairs.masks], dtype=np.int64)
    assistant = answers[list(order)] if order else lengths
    return {
        "rows": len(draws),
        "by_source": tally(problems[draw.problem].source for draw in draws),
        "by_style": tally(draw.style for draw in draws),
        "by_level": tally(problems[draw.problem].level or "unknown" for draw in draws),
        "by_phase": [
            tally(draw.style for draw in draws if draw.phase == phase)
            for phase in sorted({draw.phase for draw in draws})
        ],
        "tokens": {
            "all": int(lengths.sum()),
            "assistant": int(assistant.sum()),
            "prompt": int(lengths.sum() - assistant.sum()),
        },
        "length": length_figures(lengths),
    }
