"""A grader's scores of a solution's segments to their rewards, term by term as in 001_….

Of a solution with M thoughts a grader says G (the whole), S_k (thought k) and P_k (how far along
the solution is behind thought k). Then

    Ŝ_k  = (S_k − μ_S) / σ_S, σ_S = √(var S + ε_std);     times α where ≥ 0, times δ where < 0
    P̄_k  = P_1 for k = 1, else the mean of the last min(W, k − 1) P before k
    ΔP_k = P_k − P̄_k
    E_k  = √ΔP · P_k/κ⁺ for ΔP > 0;  −log(1 + |ΔP|) · (B − P_k)/κ⁻ for ΔP < 0;  0 at 0
    m_k  = S_k / λ,   Q_k = E_k · m_k
    C_k  = G + Ŝ_k + Q_k;                                 (C_k − μ_C) / σ_C where asked for
    R_k  = clip(C_k, α1·G, G + α2) for a thought,   R_{M+1} = ρ·G for the final answer

Source: 001_… (Reward Processing). Readings: the symbol table names ρ, α1 and α2 without a formula,
so R_k and R_{M+1} are methods.md's reading, and the caps are off where α1 and α2 are not given
(where they cross, the upper one holds). Every thought carries the whole of G, as written: with γ
near 1 a good solution of more thoughts is worth more. 001_… gives no values: the defaults weigh
both sides alike (α = δ = κ⁺ = κ⁻ = λ = ρ = 1) and B = 1, the largest score.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pydantic import Field

from data_prep.config import Config


class SegmentRewardConfig(Config):
    """The constants of the formula.

    Attributes:
        epsilon_std: ε_std.
        alpha: α.
        delta: δ.
        window: W.
        kappa_plus: κ⁺.
        kappa_minus: κ⁻.
        base: B.
        lam: λ.
        zscore: Whether C_k is normalised over the solution's thoughts.
        alpha1: α1, the lower cap as a share of G; None for no cap.
        alpha2: α2, the upper cap above G; None for no cap.
        rho: ρ, of the final answer.
    """

    epsilon_std: float = Field(default=1e-6, gt=0.0)
    alpha: float = Field(default=1.0, ge=0.0)
    delta: float = Field(default=1.0, ge=0.0)
    window: int = Field(default=3, ge=1)
    kappa_plus: float = Field(default=1.0, gt=0.0)
    kappa_minus: float = Field(default=1.0, gt=0.0)
    base: float = 1.0
    lam: float = Field(default=1.0, gt=0.0)
    zscore: bool = False
    alpha1: float | None = None
    alpha2: float | None = Field(default=None, ge=0.0)
    rho: float = 1.0


class Grades(NamedTuple):
    """What a grader says of one solution.

    Attributes:
        overall: G.
        thoughts: S_1 … S_M.
        progress: P_1 … P_M.
    """

    overall: float
    thoughts: list[float]
    progress: list[float]


def segment_rewards(grades: Grades, answered: bool, config: SegmentRewardConfig) -> list[float]:
    """Return R_1 … R_M, and R_{M+1} where there is a final answer.

    Raises:
        ValueError: Not as many S as P.
    """
    overall = grades.overall
    effects = [
        progress_effect(p, mean, config) * s / config.lam
        for p, mean, s in zip(
            grades.progress,
            moving_average(grades.progress, config.window),
            grades.thoughts,
            strict=True,
        )
    ]
    scaled = scaled_thoughts(grades.thoughts, config)
    combined = [overall + s + q for s, q in zip(scaled, effects, strict=True)]
    if config.zscore:
        combined = standardised(combined, config.epsilon_std)
    low = -math.inf if config.alpha1 is None else config.alpha1 * overall
    high = math.inf if config.alpha2 is None else overall + config.alpha2
    rewards = [min(max(value, low), high) for value in combined]
    return [*rewards, config.rho * overall] if answered else rewards


def standardised(values: list[float], epsilon: float) -> list[float]:
    """Return (x − mean) / √(var + ε), population variance."""
    if not values:
        return []
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + epsilon)
    return [(v - mean) / spread for v in values]


def scaled_thoughts(thoughts: list[float], config: SegmentRewardConfig) -> list[float]:
    """Return Ŝ_k, scaled by α or δ."""
    found = standardised(thoughts, config.epsilon_std)
    return [(config.alpha if s >= 0 else config.delta) * s for s in found]


def moving_average(progress: list[float], window: int) -> list[float]:
    """Return P̄_k."""
    found = progress[:1]
    for k in range(1, len(progress)):
        before = progress[max(0, k - window) : k]
        found.append(sum(before) / len(before))
    return found


def progress_effect(progress: float, mean: float, config: SegmentRewardConfig) -> float:
    """Return E_k of P_k and P̄_k."""
    gain = progress - mean
    if gain > 0:
        return math.sqrt(gain) * progress / config.kappa_plus
    if gain < 0:
        return -math.log1p(-gain) * (config.base - progress) / config.kappa_minus
    return 0.0
