"""The clipped surrogate with a group baseline: what GRPO and its relatives share.

    J  = Σ_t w_t [ min(ρ_t Â_t, clip(ρ_t, 1−ε_low, 1+ε_high) Â_t) − β k_t ],  ρ = π_θ/π_old
    GC = ρ Â where the unclipped branch is active (Â > 0 and ρ ≤ 1+ε_high, or Â < 0 and
         ρ ≥ 1−ε_low), else 0; minus β ∂k/∂log π_θ

k is k2 or k3 (`pipeline.divergence`). With kl = "k1" there is no such term: the reward of every
token carries −β (log π_old − log π_ref), and its return to go joins the advantage,

    Â_t = Â − β Σ_{s ≥ t} (log π_old,s − log π_ref,s)

Source: 000_… eq. 11, 14 to 17; 002_… (the clip); 003_… (k1 in the reward). Deviation: the k1
return is added after the rewards of a group were compared, so that β keeps its unit whatever the
spread of the rewards. A group whose rewards are all equal has no signal and leaves the step,
denominators and KL term included.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from pipeline.advantage import by_group
from pipeline.batch import Sequence, Tokens
from pipeline.divergence import Estimator, estimate, slope
from pipeline.methods import Method, MethodConfig


class SurrogateConfig(MethodConfig):
    """Settings of every clipped surrogate.

    Attributes:
        clip_low: ε_low.
        clip_high: ε_high.
        beta: Weight of the KL estimate; 0 needs no reference model.
        kl: Which estimate: "k2" or "k3" as a loss term, "k1" in the reward.
    """

    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.2, gt=0.0)
    beta: float = Field(default=0.0, ge=0.0)
    kl: Estimator = "k3"


class Surrogate(Method):
    """Compare the samples of one prompt, and step no further than the clip allows."""

    source = "policy"
    config: SurrogateConfig

    def __init__(self, config: SurrogateConfig) -> None:
        """Ask for a reference model only where the KL term has weight."""
        super().__init__(config)
        self.reference = config.beta > 0.0

    @abstractmethod
    def compare(self, rewards: list[float]) -> list[float]:
        """Return the advantages of one group's scored samples, in their order."""

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Set Â; return the sequences of groups with unequal rewards."""
        kept: list[Sequence] = []
        for group in by_group(sequences).values():
            rewards = [s.reward for s in group if s.reward is not None]
            for sequence, advantage in zip(group, self.compare(rewards), strict=True):
                sequence.advantage = advantage
            if any(s.advantage for s in group):
                kept += group
        return kept

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return the surrogate minus β·k."""
        terms = self.surrogate(self.ratio(tokens, logp), self.advantage(tokens), logp)
        if self.config.beta and self.config.kl != "k1":
            terms = terms - self.config.beta * estimate(
                self.config.kl, logp, self._ref_logp(tokens)
            )
        return (tokens.weight * terms).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return the surrogate's coefficient minus β·∂k/∂log π_θ."""
        coefficient = self.surrogate_coefficient(self.ratio(tokens, logp), self.advantage(tokens))
        if self.config.beta and self.config.kl != "k1":
            coefficient = coefficient - self.config.beta * slope(
                self.config.kl, logp, self._ref_logp(tokens)
            )
        return coefficient

    def surrogate(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        """Return min(ρÂ, clip(ρ)Â), [T]. `logp` is there for surrogates without a ratio's slope."""
        clipped = ratio.clamp(1.0 - self.config.clip_low, 1.0 + self.config.clip_high)
        return torch.minimum(ratio * advantage, clipped * advantage)

    def surrogate_coefficient(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return ρÂ on active tokens, [T]."""
        return torch.where(self.clipped(ratio, advantage), 0.0, ratio * advantage)

    def clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return where the clip binds, [T] bool."""
        high = (advantage > 0) & (ratio > 1.0 + self.config.clip_high)
        low = (advantage < 0) & (ratio < 1.0 - self.config.clip_low)
        return high | low

    def ratio(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return ρ, [T]."""
        return torch.exp(logp - self.old_logp(tokens))

    def advantage(self, tokens: Tokens) -> Tensor:
        """Return Â, [T], with the KL's return to go where it stands in the reward."""
        if self.config.beta and self.config.kl == "k1":
            return tokens.advantage - self.config.beta * self.return_of(
                tokens, estimate("k1", self.old_logp(tokens), self._ref_logp(tokens))
            )
        return tokens.advantage

    def return_of(self, tokens: Tokens, rewards: Tensor) -> Tensor:
        """Return what the rewards of tokens, [T], are worth at each of them, [T]."""
        return tokens.to_go(rewards)

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return the clip shares, and the ratio's mean and extremes."""
        ratio = self.ratio(tokens, logp)
        clipped = self.clipped(ratio, self.advantage(tokens))
        low, high = clipped & (ratio < 1.0), clipped & (ratio > 1.0)
        return {
            "clip_share": float(clipped.to(ratio.dtype).mean()),
            "clip_share_low": float(low.to(ratio.dtype).mean()),
            "clip_share_high": float(high.to(ratio.dtype).mean()),
            "ratio_mean": float(ratio.mean()),
            "ratio_min": float(ratio.min()),
            "ratio_max": float(ratio.max()),
        }

    def old_logp(self, tokens: Tokens) -> Tensor:
        """Return log π_old, [T]."""
        if tokens.old_logp is None:
            raise ValueError("a ratio needs the log-probs of the behaviour policy")
        return tokens.old_logp

    def _ref_logp(self, tokens: Tokens) -> Tensor:
        if tokens.ref_logp is None:
            raise ValueError("a KL term needs the log-probs of the reference")
        return tokens.ref_logp
