"""Dr. GRPO: GRPO without its length bias and its difficulty bias.

    Â_i = r_i − mean r          no division by the spread: easy and hard prompts weigh the same
    Z   = N · L_max             no division by |o|: long wrong answers are no cheaper
    GC  = the clipped surrogate's (`_surrogate.py`) on Â

D and reward as in GRPO. On-policy, groups of G: E Σ_i Â_i ∇log π / G = (G−1)/G · ∇E r.

Source: methods.md section 7 (Dr. GRPO); no KL by default, as there. Deviation: a group without
signal leaves N, as everywhere here; counted in, it would only make the step smaller.
"""

from __future__ import annotations

from pipeline.advantage import centred
from pipeline.methods._surrogate import Surrogate, SurrogateConfig
from pipeline.normaliser import Normaliser


class Config(SurrogateConfig):
    """Settings of Dr. GRPO."""

    kind: str = "dr_grpo"
    normaliser: Normaliser = "constant"


class DrGrpo(Surrogate):
    """Compare the samples of one prompt with their mean."""

    def compare(self, rewards: list[float]) -> list[float]:
        """Return r − mean."""
        return centred(rewards)


def create(config: Config) -> DrGrpo:
    """Return the method."""
    return DrGrpo(config)
