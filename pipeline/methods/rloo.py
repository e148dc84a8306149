"""REINFORCE with a leave-one-out baseline.

    Â_i = r_i − mean of the others = G/(G−1) · (r_i − mean r)
    GC  = the clipped surrogate's (`_surrogate.py`) on Â; ρ = 1 at the first update, so GC = Â

D and reward as in GRPO. The baseline does not contain r_i, so on-policy
E Σ_i Â_i ∇log π / G = ∇E r exactly: the gradient of normaliser "constant", times L_max. The
default, "sequence", takes the mean over a sequence's tokens as GRPO does. A sample without others
to compare with has no signal.

Source: methods.md section 7 (RLOO). Deviation: the clip, for more than one update on a batch.
"""

from __future__ import annotations

from pipeline.advantage import leave_one_out
from pipeline.methods._surrogate import Surrogate, SurrogateConfig


class Config(SurrogateConfig):
    """Settings of RLOO."""

    kind: str = "rloo"


class Rloo(Surrogate):
    """Compare each sample with the others of its prompt."""

    def compare(self, rewards: list[float]) -> list[float]:
        """Return r − mean of the others."""
        return leave_one_out(rewards)


def create(config: Config) -> Rloo:
    """Return the method."""
    return Rloo(config)
