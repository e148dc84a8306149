"""Rewards of a group to advantages. Unscored sequences (reward None) take no part."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from pipeline.batch import Sequence


def by_group(sequences: list[Sequence]) -> dict[int, list[Sequence]]:
    """Return the scored sequences of each group."""
    groups: dict[int, list[Sequence]] = defaultdict(list)
    for sequence in sequences:
        if sequence.reward is not None:
            groups[sequence.group].append(sequence)
    return groups


def normalised(rewards: list[float], epsilon: float) -> list[float]:
    """Return (r − mean) / (std + ε) with the population standard deviation.

    Equal rewards give exactly 0. Known value: 8 rewards, one of them 1, ε → 0: 2.6458 for that
    one and −0.3780 for the others.

    Source: 002_… (A_i = (R_i − μ_R)/(σ_R + ε_R)), 000_… eq. 15.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.max() == values.min():
        return [0.0] * len(rewards)
    return list((values - values.mean()) / (values.std() + epsilon))


def centred(rewards: list[float]) -> list[float]:
    """Return r − mean. Equal rewards give exactly 0.

    Source: methods.md section 7 (Dr. GRPO; over a batch: REINFORCE).
    """
    if not rewards or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(rewards: list[float]) -> list[float]:
    """Return r − mean of the others = G/(G−1) · (r − mean); 0 where there are no others.

    Source: methods.md section 7 (RLOO).
    """
    count = len(rewards)
    return [value * count / (count - 1) for value in centred(rewards)] if count > 1 else [0.0]
