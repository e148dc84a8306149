"""Where a gain comes from: choosing the better style of answer, or being better at one.

Reinforcement with verifiable rewards mostly moves probability to what the model could already
do. The shift-share decomposition (Kitagawa 1955) says how much of a difference that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.grading import Graded
from eval.statistics import Interval, bootstrap_ratios, bootstrap_sums

STYLES = ("worked", "bare")


@dataclass(frozen=True, slots=True)
class StyleFigures:
    """How often a checkpoint answers in a style, and how well.

    Attributes:
        share: Share of samples in the style.
        accuracy: Share of correct ones among them; NaN where there are none.
    """

    share: Interval
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The difference of avg@n between two checkpoints, in two parts that add up to it.

    Attributes:
        difference: B − A.
        choice: Σ_style (share_B − share_A) · (accuracy_A + accuracy_B) / 2.
        skill: Σ_style (share_A + share_B) / 2 · (accuracy_B − accuracy_A).
    """

    difference: Interval
    choice: Interval
    skill: Interval


def _counts(groups: Sequence[Sequence[Graded]]) -> np.ndarray:
    """Return, a question, the samples and the correct ones of each style: shape [2 S, Q]."""
    rows = [[sum(r.style == s for r in group) for group in groups] for s in STYLES]
    rows += [
        [sum(r.style == s and r.is_correct for r in group) for group in groups] for s in STYLES
    ]
    return np.array(rows, dtype=np.float64)


def style_figures(
    groups: Sequence[Sequence[Graded]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, StyleFigures]:
    """Return share and accuracy of each style, with intervals clustered by question."""
    counts = _counts(groups)
    made, right = counts[: len(STYLES)], counts[len(STYLES) :]
    everything = np.broadcast_to(made.sum(axis=0), made.shape)
    shares = bootstrap_ratios(made, everything, resamples=resamples, seed=seed)
    accuracies = bootstrap_ratios(right, made, resamples=resamples, seed=seed)
    return {
        style: StyleFigures(share, accuracy)
        for style, share, accuracy in zip(STYLES, shares, accuracies, strict=True)
    }


def decompose(
    before: Sequence[Sequence[Graded]],
    after: Sequence[Sequence[Graded]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Decomposition:
    """Return the shift-share decomposition of the difference of avg@n, after − before.

        Δ = Σ_s (p_s' − p_s) (a_s + a_s')/2  +  Σ_s (p_s + p_s')/2 (a_s' − a_s)

    with p_s the share and a_s the accuracy of style s. A style that one checkpoint never uses
    has no accuracy there; the other's stands in, so that all of its share is choice.

    Args:
        before: n rows a question.
        after: n rows a question, of the same questions in the same order.
        resamples: Resampled sets of questions.
        seed: Seed of the resampling.

    Source: Kitagawa 1955, "Components of a Difference Between Two Rates".
    """
    size = len(STYLES)

    def parts(sums: np.ndarray) -> np.ndarray:
        made_a, right_a, made_b, right_b = np.split(sums, 4, axis=1)
        share_a = made_a / made_a.sum(axis=1, keepdims=True)
        share_b = made_b / made_b.sum(axis=1, keepdims=True)
        nothing = np.zeros_like(share_a)
        accuracy_a = np.divide(right_a, made_a, out=nothing.copy(), where=made_a > 0)
        accuracy_b = np.divide(right_b, made_b, out=nothing.copy(), where=made_b > 0)
        accuracy_a = np.where(made_a > 0, accuracy_a, accuracy_b)
        accuracy_b = np.where(made_b > 0, accuracy_b, accuracy_a)
        choice = ((share_b - share_a) * (accuracy_a + accuracy_b) / 2).sum(axis=1)
        skill = ((share_a + share_b) / 2 * (accuracy_b - accuracy_a)).sum(axis=1)
        return np.stack([choice + skill, choice, skill], axis=1)

    columns = np.concatenate([_counts(before), _counts(after)])
    assert columns.shape[0] == 4 * size  # noqa: S101 - what `parts` splits
    found = bootstrap_sums(columns, parts, resamples=resamples, seed=seed)
    return Decomposition(*found)
