"""Rewards of a group to advantages. Unscored sequences (reward None) take no part."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Sequence, Tokens


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


def process_normalised(
    group: list[list[tuple[int, float]]], lengths: list[int], epsilon: float
) -> list[list[float]]:
    """Return Â_{i,t} = Σ of the normalised rewards of the steps that end at or after t.

    All step rewards of the group are normalised together: r̃ = (r − mean) / (std + ε) with the
    population standard deviation. Known case, two outputs with steps (0, 0, 1) and (0, 0, 0), each
    a token long: mean 1/6, std √5/6, so r̃ is √5 for the right step and −1/√5 for the others, and
    Â is (3/√5, 4/√5, 5/√5) and (−3/√5, −2/√5, −1/√5).

    Args:
        group: (token that ends it, reward) of each step of each output.
        lengths: Tokens of each output; tokens after the last step get 0.
        epsilon: ε_R.

    Source: 003_… (process supervision).
    """
    rewards = [value for steps in group for _, value in steps]
    found = iter(normalised(rewards, epsilon)) if rewards else iter(())
    advantages = []
    for steps, length in zip(group, lengths, strict=True):
        own = [0.0] * length
        for end, _ in steps:
            own[end] += next(found)
        for t in range(length - 2, -1, -1):
            own[t] += own[t + 1]
        advantages.append(own)
    return advantages


def token_rewards(tokens: Tokens) -> Tensor:
    """Return the reward that stands at each token, [T]: the steps', or the whole's at the end."""
    has_steps = tokens.per_sequence((~tokens.step_reward.isnan()).to(tokens.weight.dtype)) > 0
    whole = torch.where(has_steps, 0.0, tokens.reward)[tokens.sequence]
    return tokens.step_reward.nan_to_num(0.0) + torch.where(tokens.is_last, whole, 0.0)


def generalised_advantages(
    tokens: Tokens, rewards: Tensor, gamma: float, lam: float, bootstrap: bool
) -> Tensor:
    """Return A_t = Σ_l (γλ)^l δ_{t+l}, [T], with δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    After the last token V is 0, or V of the state it leads to where the completion was cut off
    and `bootstrap` is set.

    Args:
        tokens: Whole sequences, with `old_value` and `end_value`.
        rewards: [T].
        gamma: γ.
        lam: λ.
        bootstrap: Whether truncation is not an end.

    Source: 001_… (GAE); methods.md section 5.
    """
    if tokens.old_value is None or tokens.end_value is None:
        raise ValueError("advantages by GAE need the values of a critic")
    cut = tokens.truncated[tokens.sequence] if bootstrap else torch.zeros_like(tokens.is_last)
    following = torch.where(
        tokens.is_last,
        torch.where(cut, tokens.end_value, 0.0),
        torch.roll(tokens.old_value, -1),
    )
    delta = rewards + gamma * following - tokens.old_value
    # Sequences of like length run side by side; a position is one product for all of them.
    lengths = tokens.lengths.to(torch.int64)
    ends = torch.cumsum(lengths, 0)
    found = torch.zeros_like(delta)
    running = torch.zeros_like(tokens.lengths)
    for back in range(1, int(lengths.max()) + 1):
        live = lengths >= back
        place = (ends - back)[live]
        running[live] = delta[place] + gamma * lam * running[live]
        found[place] = running[live]
    return found


def whitened(values: Tensor) -> Tensor:
    """Return (x − mean) / (std + 1e-8) over all tokens of the step, population std, [T]."""
    return (values - values.mean()) / (values.std(unbiased=False) + 1e-8)
