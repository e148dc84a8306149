"""REINFORCE with the mean reward of the batch as baseline.

    Â_i = r_i − mean r over all scored samples of the step
    J   = Σ_t w_t Â_i log π_θ,   GC = Â_i

D: q ~ P, o ~ π_θ afresh each step; reward: the verdict. The baseline contains r_i, so on-policy
the expected gradient is (N−1)/N · ∇E r with normaliser "constant", times L_max. Prompts are
compared with each other: a group of equal rewards keeps its signal, and samples whose advantage is
0 stay in the denominators.

Source: methods.md section 7 (REINFORCE with batch baseline). There is no ratio, so a second update
on the same batch would follow no gradient of this objective: `updates` is 1.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from pipeline.advantage import centred
from pipeline.batch import Sequence, Tokens
from pipeline.methods import Method, MethodConfig


class Config(MethodConfig):
    """Settings of REINFORCE."""

    kind: str = "reinforce"
    updates: int = Field(default=1, ge=1, le=1)


class Reinforce(Method):
    """Weigh each sample by how much better than the batch it did."""

    source = "policy"

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Set Â; return the scored sequences, or none where all rewards are equal."""
        scored = [s for s in sequences if s.reward is not None]
        found = centred([s.reward for s in scored if s.reward is not None])
        for sequence, advantage in zip(scored, found, strict=True):
            sequence.advantage = advantage
        return scored if any(found) else []

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return Σ_t w_t·Â·logp_t."""
        return (tokens.weight * tokens.advantage * logp).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return Â."""
        return tokens.advantage


def create(config: Config) -> Reinforce:
    """Return the method."""
    return Reinforce(config)
