"""Rejection sampling fine-tuning: q ~ P_sft, o ~ π_sft sampled once, GC = I(o correct).

    J = E[ 1/|o| Σ_t I(o) log π_θ(o_t | q, o_<t) ]          Source: 000_… eq. 3 to 5

Two denominators are possible and are named. `denominator = "kept"` (default) is the mean over the
chosen correct samples: fine-tuning on the filtered set. `"sampled"` is eq. 3 as written, the mean
over all judged samples of the log: the coefficient is then the share of them that was kept, which
scales the gradient and changes nothing else.

Selection: at most `per_problem` correct samples a problem, distinct by normalised reasoning path
(the ordered list of equations), shortest or random first.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import Literal

from pydantic import Field
from torch import Tensor

from pipeline.batch import Sequence, Tokens
from pipeline.methods import MethodConfig
from pipeline.methods._imitation import Imitation


class Config(MethodConfig):
    """Settings of RFT.

    Attributes:
        per_problem: Most samples kept of one problem.
        prefer: Which of several distinct samples come first.
        denominator: "kept" or "sampled", see above.
        epochs: Passes over the kept samples.
    """

    kind: str = "rft"
    per_problem: int = Field(default=4, ge=1)
    prefer: Literal["random", "shortest"] = "random"
    denominator: Literal["kept", "sampled"] = "kept"
    epochs: int = Field(default=1, ge=1)


class Rft(Imitation):
    """Imitate the correct samples of a fixed log."""

    source = "samples"
    config: Config

    def __init__(self, config: Config) -> None:
        """Start with nothing kept."""
        super().__init__(config)
        self.kept_share = 1.0

    def select(self, sequences: list[Sequence], seed: int) -> list[list[Sequence]]:
        """Return kept samples, one a unit, in `epochs` seeded permutations."""
        rng = random.Random(f"{seed}/rft")  # noqa: S311 - an order, not a secret
        by_problem: dict[int, list[Sequence]] = defaultdict(list)
        for sequence in sequences:
            if sequence.correct:
                by_problem[sequence.group].append(sequence)
        kept: list[Sequence] = []
        for candidates in by_problem.values():
            if self.config.prefer == "shortest":
                candidates.sort(key=lambda s: len(s.completion))
            else:
                rng.shuffle(candidates)
            distinct = {reasoning_path(s.text): s for s in reversed(candidates)}
            chosen = [s for s in candidates if distinct[reasoning_path(s.text)] is s]
            kept += chosen[: self.config.per_problem]
        judged = sum(sequence.correct is not None for sequence in sequences)
        self.kept_share = len(kept) / max(1, judged)
        order: list[Sequence] = []
        for _ in range(self.config.epochs):
            rng.shuffle(kept)
            order += kept
        return [[sequence] for sequence in order]

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return the mean over kept samples, or over sampled ones."""
        return super().objective(tokens, logp) * self._scale

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return I(o) = 1, times the kept share for the denominator "sampled"."""
        return super().gradient_coefficient(tokens, logp) * self._scale

    @property
    def _scale(self) -> float:
        return self.kept_share if self.config.denominator == "sampled" else 1.0


_EQUATION = re.compile(r"[^\n=]*=[^\n=]*")


def reasoning_path(text: str) -> tuple[str, ...]:
    """Return the ordered equations of a solution, without spaces; its words where it has none."""
    equations = tuple("".join(match.split()) for match in _EQUATION.findall(text))
    return equations or tuple(text.split())


def create(config: Config) -> Rft:
    """Return the method."""
    return Rft(config)
