"""Group relative reinforcement fine-tuning: siblings are compared from one and the same state.

    s_k       a prefix state: the prompt and the first k − 1 segments of a base completion
    o_1…o_G   siblings: continuations that π_θ samples from s_k, each scored when it is finished
    Â_i       = (r_i − mean r) / (std r + ε_R), population std, within the siblings of s_k
    GC        = the clipped surrogate's (`_surrogate.py`) on Â

With mode "segment" only the tokens of the sibling's own next segment are trained on: they are
what was chosen in s_k, the rest only shows what the choice is worth. With "tail" the whole
continuation is. With one prefix, the empty one, "tail" is GRPO, sample by sample: a test. With
every prefix of every solution, "segment" on r − mean is (G − 1)/G of the gradient of the expected
reward itself: a test.

D: q ~ P; G samples of the prompt itself (the empty prefix), and G from each further prefix. These
are cut points of the first of the prompt's samples, chosen at random where it has more than are
asked for; where it has fewer, the next sample gives the others. The base completions are thus of
the current policy and cost nothing of their own, and a step takes `batch · prefixes · group_size`
samples (`samples` in its figures counts them; fewer only where a prompt's samples have too few cut
points). Reward: the verdict of prefix and continuation together, or a critic's score of them (a
reward model, `reward.model`).

A normaliser counts the tokens that are trained on; each prefix is a group. A prefix whose
siblings have equal rewards has no signal and leaves the step, denominators and KL term included.

Source: 001_… (Reinforcement Fine-Tuning v2, GRFT), which draws the states and states no formula;
methods.md section 8. The clip and ε_R are GRPO's. Deviation: none is stated for how prefixes are
chosen, so that is the project's.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

from pydantic import Field

from pipeline.advantage import normalised
from pipeline.batch import Sequence
from pipeline.methods._surrogate import Surrogate, SurrogateConfig
from pipeline.segments import By


class Config(SurrogateConfig):
    """Settings of GRFT.

    Attributes:
        epsilon: ε_R, added to the standard deviation.
        prefixes: States a prompt is sampled from, the empty prefix included.
        mode: Whether the sibling's own next segment is trained on, or its whole continuation.
        cut: What ends a segment.
    """

    kind: str = "grft"
    beta: float = Field(default=0.05, ge=0.0)
    epsilon: float = Field(default=1e-6, ge=0.0)
    prefixes: int = Field(default=4, ge=1)
    mode: Literal["segment", "tail"] = "segment"
    cut: By = "line"


class Grft(Surrogate):
    """Compare continuations of one beginning with each other."""

    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config) -> None:
        """Have solutions cut."""
        super().__init__(config)
        self.cut = config.cut

    def prefixes(self, group: list[Sequence], rng: random.Random) -> list[tuple[int, int]]:
        """Return cut points of the first samples, no two of the same tokens."""
        found: list[tuple[int, int]] = []
        known: set[tuple[int, ...]] = set()
        for number, base in enumerate(group):
            missing = self.config.prefixes - 1 - len(found)
            if missing <= 0:
                break
            lengths = [n for n in base.cut_points if tuple(base.completion[:n]) not in known]
            known.update(tuple(base.completion[:n]) for n in lengths)
            chosen = sorted(rng.sample(lengths, min(missing, len(lengths))))
            found += [(number, length) for length in chosen]
        return found

    def samples(self, group_size: int) -> int:
        """Return G a prefix."""
        return self.config.prefixes * group_size

    def compare(self, rewards: list[float]) -> list[float]:
        """Return (r − mean) / (std + ε_R)."""
        return normalised(rewards, self.config.epsilon)

    def advantages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Set Â; return what is trained on of the siblings with unequal rewards."""
        kept = super().advantages(sequences)
        return [first_segment(s) for s in kept] if self.config.mode == "segment" else kept


def first_segment(sequence: Sequence) -> Sequence:
    """Return a copy that ends with the first segment; what follows is not even looked at."""
    end = min(sequence.cut_points, default=len(sequence.completion))
    return replace(
        sequence,
        completion=sequence.completion[:end],
        mask=sequence.mask[:end],
        segments=sequence.segments[:end],
        pieces=sequence.pieces[:1],
        logprobs=sequence.logprobs[:end],
    )


def create(config: Config) -> Grft:
    """Return the method."""
    return Grft(config)
