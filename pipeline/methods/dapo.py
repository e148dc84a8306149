"""DAPO: GRPO that reaches higher, weighs tokens, and samples until every prompt teaches.

* Clip-higher: ε_low = 0.2, ε_high = 0.28.
* One mean over all tokens of the step: normaliser "token" (as commonly run; "group_token" is
  001_…'s equation, a mean over each group's tokens first).
* No KL.
* Dynamic sampling: a prompt counts where its accuracy lies strictly between 0 and 1; further
  prompts are drawn until the batch is full, at most `refill` times.
* Soft overlong penalty: 0 up to L_max − L_cache tokens, down to −1 at L_max, on top of the
  verdict's 0 or 1, and like it at the last token where steps have rewards of their own.
* Overlong mask, an option: a completion cut off at L_max has no reward at all; it is in no
  baseline, no accuracy between 0 and 1, and no denominator.

D: q ~ P restricted to prompts that the policy neither solves always nor never, o ~ π_θ.
GC = GRPO's, without the KL term. With equal clips, normaliser "sequence" and no penalty the
gradient is GRPO's without KL: a test.

Source: 001_… (token mean, clip-higher, dynamic sampling), methods.md section 7 (overlong penalty
and mask). L_cache is a share of L_max; 0.2 is DAPO's 4,096 of 20,480 tokens.
"""

from __future__ import annotations

from pydantic import Field

from pipeline.batch import Sequence
from pipeline.methods import grpo
from pipeline.normaliser import Normaliser
from pipeline.reward import overlong_penalty


class Config(grpo.Config):
    """Settings of DAPO.

    Attributes:
        refill: Most further draws of prompts a step; 0 leaves prompts without signal out and
            draws none in their place.
        overlong_share: L_cache as a share of L_max; 0 is no penalty.
        overlong_mask: Whether a completion that was cut off has no reward.
    """

    kind: str = "dapo"
    normaliser: Normaliser = "token"
    clip_high: float = Field(default=0.28, gt=0.0)
    beta: float = Field(default=0.0, ge=0.0)
    refill: int = Field(default=8, ge=0)
    overlong_share: float = Field(default=0.2, ge=0.0, le=1.0)
    overlong_mask: bool = False


class Dapo(grpo.Grpo):
    """GRPO on prompts of mixed accuracy."""

    needs_verdicts = True

    def __init__(self, config: Config) -> None:
        """Keep what shapes rewards and the draw."""
        super().__init__(config)
        self.refill = config.refill
        self.overlong_share, self.overlong_mask = config.overlong_share, config.overlong_mask

    def shape(self, reward: float, sequence: Sequence, max_tokens: int) -> float | None:
        """Return the reward minus the overlong penalty; None where it is masked."""
        if self.overlong_mask and sequence.finish_reason == "length":
            return None
        cache = round(self.overlong_share * max_tokens)
        return reward + overlong_penalty(len(sequence.completion), max_tokens, cache)

    def usable(self, group: list[Sequence]) -> bool:
        """Return whether some, but not all, of a group's scored samples are correct."""
        return 0 < sum(bool(s.correct) for s in group) < len(group)


def create(config: Config) -> Dapo:
    """Return the method."""
    return Dapo(config)
