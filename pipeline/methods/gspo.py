"""Group sequence policy optimisation: ratio and clip of whole sequences.

    ρ_i = exp( mean_t (log π_θ − log π_old) )            one number a sequence
    J   = Σ_t w_t min(ρ_i Â_i, clip(ρ_i, 1−ε_low, 1+ε_high) Â_i) − β k_t
    GC  = ρ_i Â_i on all tokens of a sequence that is not clipped, else 0; minus β ∂k/∂log π_θ

∂ρ_i/∂logp_t = ρ_i/|o_i|, and a sequence's |o_i| equal terms w_t add that up to w_t again. With
kl = "k1" the advantage is of the whole sequence too: Â_i − β Σ_t (log π_old − log π_ref).

With process supervision Â_{i,t} differs from token to token, and that sum would give each of them
the sequence's mean. So a token has the ratio sg(ρ_i) · π_θ,t / sg(π_θ,t): the same number, whose
slope is the token's own, GC = ρ_i Â_{i,t}. With one Â_i a sequence the gradient is the same.

D, reward and Â as in GRPO. With one token a sequence this is GRPO: a test.

Source: methods.md section 7 (GSPO); Zheng et al. 2025, arXiv:2507.18071 (its GSPO-token is the
ratio of a token). The ratio is a geometric mean over tokens and so stays close
to 1; the default clips are far narrower than GRPO's for that reason (the project's reading: 3e-4
and 4e-4, as commonly run).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pipeline.batch import Tokens
from pipeline.methods import grpo


class Config(grpo.Config):
    """Settings of GSPO; the clips bound ρ_i."""

    kind: str = "gspo"
    clip_low: float = Field(default=3e-4, gt=0.0, lt=1.0)
    clip_high: float = Field(default=4e-4, gt=0.0)
    beta: float = Field(default=0.0, ge=0.0)


class Gspo(grpo.Grpo):
    """GRPO with one ratio a sequence."""

    def ratio(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return ρ of each token's sequence, with the slope of the token alone, [T]."""
        gap = (logp - self.old_logp(tokens)).detach()
        mean = tokens.per_sequence(gap) / tokens.lengths
        return torch.exp(mean)[tokens.sequence] * torch.exp(logp - logp.detach())

    def return_of(self, tokens: Tokens, rewards: Tensor) -> Tensor:
        """Return the sum over each token's whole sequence, [T]."""
        return tokens.per_sequence(rewards)[tokens.sequence]


def create(config: Config) -> Gspo:
    """Return the method."""
    return Gspo(config)
