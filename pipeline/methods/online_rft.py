"""Online rejection sampling fine-tuning: q ~ P, o ~ π_θ afresh each step, GC = I(o correct).

    J = E[ 1/|o| Σ_t I(o) log π_θ(o_t | q, o_<t) ]

As RFT, but the samples come from the policy that is being trained. Two denominators are possible
and are named. `denominator = "kept"` (default) is the mean over correct samples: fine-tuning on
the filtered set. `"sampled"` is the mean over all scored samples, as the equation says: incorrect
ones stay in Z with coefficient 0. On-policy and per sequence, the latter is ∇P(correct).

Source: 000_… eq. 6 and 7. Deviation: every correct sample is used; RFT's selection of distinct
ones is for a log that is read more than once.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pipeline.batch import Sequence, Tokens
from pipeline.methods import Method, MethodConfig


class Config(MethodConfig):
    """Settings of Online RFT.

    Attributes:
        denominator: "kept" or "sampled", see above.
    """

    kind: str = "online_rft"
    denominator: Literal["kept", "sampled"] = "kept"


class OnlineRft(Method):
    """Imitate the policy's own correct samples."""

    source = "policy"
    needs_verdicts = True
    takes_rewards = False
    config: Config

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Set I(o); return the correct sequences, or all scored ones where some are correct."""
        scored = [s for s in sequences if s.reward is not None]
        for sequence in scored:
            sequence.advantage = 1.0 if sequence.correct else 0.0
        correct = [s for s in scored if s.correct]
        return scored if correct and self.config.denominator == "sampled" else correct

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return Σ_t w_t·I(o)·logp_t."""
        return (tokens.weight * tokens.advantage * logp).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return I(o)."""
        return tokens.advantage


def create(config: Config) -> OnlineRft:
    """Return the method."""
    return OnlineRft(config)
