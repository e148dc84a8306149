"""Group relative policy optimisation with outcome supervision.

    Â_i = (r_i − mean r) / (std r + ε_R),  population std, over the group
    J   = Σ_t w_t [ min(ρ_t Â, clip(ρ_t, 1−ε_low, 1+ε_high) Â) − β k3_t ],
    k3  = exp(−d) + d − 1,  d = log π_θ − log π_ref,  ρ = exp(log π_θ − log π_old)
    GC  = ρ Â where the unclipped branch is active (Â > 0 and ρ ≤ 1+ε_high, or Â < 0 and
          ρ ≥ 1−ε_low), else 0; plus β (π_ref/π_θ − 1)

Source: 000_… eq. 15 to 17, 002_… (ε = 0.2, λ_KL = 0.05, and the clip). E_π ∇k3 is the gradient of
KL(ref‖π), not of KL(π‖ref). d is never clamped: a clamp silently zeroes the gradient. A group
whose rewards are all equal has no signal and leaves the step, denominators included.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pipeline.advantage import by_group, normalised
from pipeline.batch import Sequence, Tokens
from pipeline.methods import Method, MethodConfig


class Config(MethodConfig):
    """Settings of GRPO.

    Attributes:
        clip_low: ε_low.
        clip_high: ε_high.
        beta: Weight of the KL estimate; 0 needs no reference model.
        epsilon: ε_R, added to the standard deviation.
    """

    kind: str = "grpo"
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.2, gt=0.0)
    beta: float = Field(default=0.05, ge=0.0)
    epsilon: float = Field(default=1e-6, ge=0.0)


class Grpo(Method):
    """Compare the samples of one prompt with each other."""

    source = "policy"
    config: Config

    def __init__(self, config: Config) -> None:
        """Ask for a reference model only where the KL term has weight."""
        super().__init__(config)
        self.reference = config.beta > 0.0

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Set Â; return the sequences of groups with unequal rewards."""
        kept: list[Sequence] = []
        for group in by_group(sequences).values():
            rewards = [s.reward for s in group if s.reward is not None]
            for sequence, advantage in zip(
                group, normalised(rewards, self.config.epsilon), strict=True
            ):
                sequence.advantage = advantage
            if any(s.advantage for s in group):
                kept += group
        return kept

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return the clipped surrogate minus β·k3."""
        ratio = self._ratio(tokens, logp)
        clipped = ratio.clamp(1.0 - self.config.clip_low, 1.0 + self.config.clip_high)
        terms = torch.minimum(ratio * tokens.advantage, clipped * tokens.advantage)
        if tokens.ref_logp is not None and self.config.beta:
            d = logp - tokens.ref_logp
            terms = terms - self.config.beta * (torch.exp(-d) + d - 1.0)
        return (tokens.weight * terms).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return ρÂ on active tokens, plus β(π_ref/π_θ − 1)."""
        ratio = self._ratio(tokens, logp)
        coefficient = torch.where(self._active(tokens, ratio), ratio * tokens.advantage, 0.0)
        if tokens.ref_logp is not None and self.config.beta:
            coefficient = coefficient + self.config.beta * (torch.exp(tokens.ref_logp - logp) - 1.0)
        return coefficient

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return the clip share, the ratio's extremes and the KL estimate k3."""
        ratio = self._ratio(tokens, logp)
        found = {
            "clip_share": float((~self._active(tokens, ratio)).to(ratio.dtype).mean()),
            "ratio_min": float(ratio.min()),
            "ratio_max": float(ratio.max()),
        }
        if tokens.ref_logp is not None:
            d = logp - tokens.ref_logp
            found["kl_k3"] = float((torch.exp(-d) + d - 1.0).mean())
        return found

    def _ratio(self, tokens: Tokens, logp: Tensor) -> Tensor:
        if tokens.old_logp is None:
            raise ValueError("GRPO needs the log-probs of the behaviour policy")
        return torch.exp(logp - tokens.old_logp)

    def _active(self, tokens: Tokens, ratio: Tensor) -> Tensor:
        high = (tokens.advantage > 0) & (ratio > 1.0 + self.config.clip_high)
        low = (tokens.advantage < 0) & (ratio < 1.0 - self.config.clip_low)
        return ~(high | low)


def create(config: Config) -> Grpo:
    """Return the method."""
    return Grpo(config)
