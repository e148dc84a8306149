"""Group relative policy optimisation, with outcome or process supervision.

    outcome:  Â_i     = (r_i − mean r) / (std r + ε_R),  population std, over the group
    process:  Â_{i,t} = Σ_{steps j that end at or after t} r̃_i^j,
              r̃ normalised the same way over all step rewards of the group
    GC  = the clipped surrogate's (`_surrogate.py`) on Â, plus β (π_ref/π_θ − 1) for kl = "k3"

Rewards of steps come from `reward.process`; the last token carries the whole's. With one step a
solution, its last token, process supervision is outcome supervision. Iterative GRPO (003_…
algorithm 1) is `iterations` of the stage, with `reward.retrain` for a reward model.

D: q ~ P, a group of o ~ π_θ afresh each step. Reward: the verdict. Known value, G = 8, one
correct, ε_R → 0: 2.6458 for the correct one, −0.3780 for the others.

Source: 000_… eq. 15 to 17, 002_… (ε = 0.2, λ_KL = 0.05, and the clip). E_π ∇k3 is the gradient of
KL(ref‖π), not of KL(π‖ref); kl = "k2" and "k1" give the latter (`pipeline.divergence`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.advantage import by_group, normalised, process_normalised
from pipeline.batch import Sequence
from pipeline.methods._surrogate import Surrogate, SurrogateConfig


class Config(SurrogateConfig):
    """Settings of GRPO.

    Attributes:
        epsilon: ε_R, added to the standard deviation.
        supervision: Whether a sample's reward weighs all its tokens, or each step has its own.
    """

    kind: str = "grpo"
    beta: float = Field(default=0.05, ge=0.0)
    epsilon: float = Field(default=1e-6, ge=0.0)
    supervision: Literal["outcome", "process"] = "outcome"


class Grpo(Surrogate):
    """Compare the samples of one prompt with each other, in units of their spread."""

    def __init__(self, config: Config) -> None:
        """Keep ε_R."""
        super().__init__(config)
        self.epsilon, self.supervision = config.epsilon, config.supervision
        self.takes_steps = config.supervision == "process"
        self.takes_outcomes = not self.takes_steps

    def compare(self, rewards: list[float]) -> list[float]:
        """Return (r − mean) / (std + ε_R)."""
        return normalised(rewards, self.epsilon)

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Set Â; return the sequences of groups with signal."""
        if self.supervision == "outcome":
            return super().advantages(sequences)
        kept: list[Sequence] = []
        for group in by_group(sequences).values():
            steps = [s.steps or [(len(s.completion) - 1, s.reward or 0.0)] for s in group]
            lengths = [len(s.completion) for s in group]
            found = process_normalised(steps, lengths, self.epsilon)
            for sequence, advantages in zip(group, found, strict=True):
                sequence.advantages = advantages
            if any(value for advantages in found for value in advantages):
                kept += group
        return kept


def create(config: Config) -> Grpo:
    """Return the method."""
    return Grpo(config)
