"""CISPO: clip the importance weight, never the gradient.

    J  = Σ_t w_t sg( clip(ρ_t, 1−ε_low, 1+ε_high) ) Â_t log π_θ − β k_t
    GC = clip(ρ_t, 1−ε_low, 1+ε_high) Â_t; minus β ∂k/∂log π_θ

A token beyond the clip keeps a bounded weight, where GRPO drops it. D, reward and Â as in GRPO.

Source: methods.md section 7 (CISPO); MiniMax-M1 (arXiv:2506.13585), whose mean over the tokens of
a group is "group_token" here; the default is over those of the step. J is the function whose
gradient this is, not a return: its value has no meaning of its own. `clip_low = 1` is no lower
bound, the default.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from pipeline.methods import grpo
from pipeline.normaliser import Normaliser


class Config(grpo.Config):
    """Settings of CISPO; the clips bound the weight."""

    kind: str = "cispo"
    normaliser: Normaliser = "token"
    clip_low: float = Field(default=1.0, gt=0.0, le=1.0)
    clip_high: float = Field(default=0.28, gt=0.0)
    beta: float = Field(default=0.0, ge=0.0)


class Cispo(grpo.Grpo):
    """GRPO whose clip bounds the weight of a token and leaves none out."""

    def surrogate(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        """Return sg(clip(ρ))·Â·logp, [T]."""
        return self.surrogate_coefficient(ratio.detach(), advantage) * logp

    def surrogate_coefficient(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return clip(ρ)·Â, [T]."""
        return ratio.clamp(1.0 - self.config.clip_low, 1.0 + self.config.clip_high) * advantage

    def clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return where the weight is bounded, [T] bool, whatever the advantage's sign."""
        return (ratio > 1.0 + self.config.clip_high) | (ratio < 1.0 - self.config.clip_low)


def create(config: Config) -> Cispo:
    """Return the method."""
    return Cispo(config)
