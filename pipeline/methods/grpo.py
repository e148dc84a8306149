"""Group relative policy optimisation with outcome supervision.

    Â_i = (r_i − mean r) / (std r + ε_R),  population std, over the group
    GC  = the clipped surrogate's (`_surrogate.py`) on Â, plus β (π_ref/π_θ − 1) for kl = "k3"

D: q ~ P, a group of o ~ π_θ afresh each step. Reward: the verdict. Known value, G = 8, one
correct, ε_R → 0: 2.6458 for the correct one, −0.3780 for the others.

Source: 000_… eq. 15 to 17, 002_… (ε = 0.2, λ_KL = 0.05, and the clip). E_π ∇k3 is the gradient of
KL(ref‖π), not of KL(π‖ref); kl = "k2" and "k1" give the latter (`pipeline.divergence`).
"""

from __future__ import annotations

from pydantic import Field

from pipeline.advantage import normalised
from pipeline.methods._surrogate import Surrogate, SurrogateConfig


class Config(SurrogateConfig):
    """Settings of GRPO.

    Attributes:
        epsilon: ε_R, added to the standard deviation.
    """

    kind: str = "grpo"
    beta: float = Field(default=0.05, ge=0.0)
    epsilon: float = Field(default=1e-6, ge=0.0)


class Grpo(Surrogate):
    """Compare the samples of one prompt with each other, in units of their spread."""

    def __init__(self, config: Config) -> None:
        """Keep ε_R."""
        super().__init__(config)
        self.epsilon = config.epsilon

    def compare(self, rewards: list[float]) -> list[float]:
        """Return (r − mean) / (std + ε_R)."""
        return normalised(rewards, self.epsilon)


def create(config: Config) -> Grpo:
    """Return the method."""
    return Grpo(config)
