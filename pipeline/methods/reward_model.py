"""Bradley–Terry reward model: the preferred answer of a pair scores higher.

    J   = E log σ(R⁺ − R⁻)
    GC⁺ = +σ(R⁻ − R⁺),   GC⁻ = −σ(R⁻ − R⁺)        (∂J/∂R, times the number of pairs)

R_φ is read after the last token of the answer. D: preference pairs of the data stage, or one
correct and one incorrect sample of a prompt from a verified sample log. Known value: equal scores
have loss log 2 and GC = ±½; swapping a pair flips every sign.

Figures: loss, share of pairs ranked right, margin, and the calibration error: the mean gap, over
ten bins of equal count of the larger side's predicted probability, between that probability and
the share of pairs whose larger side is the preferred one.

Source: 002_…, 003_… (the ranking objective inside DPO's derivation); methods.md section 4.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.batch import Sequence, Tokens
from pipeline.methods import MethodConfig
from pipeline.methods._scores import Scores
from pipeline.pairs import verified_pairs

BINS = 10


class Config(MethodConfig):
    """Settings of the reward model.

    Attributes:
        normaliser: Always a mean over pairs.
        data: "pairs" of the data stage, or a log of verified "samples".
        pairs: Most pairs of one prompt, from samples.
        equal_length: Prefer pairs of nearly equal length, from samples.
        epochs: Passes over the pairs, from samples.
        updates: Always 1.
    """

    kind: str = "reward_model"
    normaliser: Literal["sequence"] = "sequence"  # type: ignore[assignment]
    data: Literal["pairs", "samples"] = "pairs"
    pairs: int = Field(default=4, ge=1)
    equal_length: bool = False
    epochs: int = Field(default=1, ge=1)
    updates: int = Field(default=1, ge=1, le=1)


class RewardModel(Scores):
    """Rank pairs."""

    config: Config

    def __init__(self, config: Config) -> None:
        """Take the source that the config names."""
        super().__init__(config)
        self.source = config.data

    def select(self, sequences: list[Sequence], seed: int) -> list[list[Sequence]]:
        """Return pairs [correct, incorrect], in `epochs` seeded permutations."""
        rng = random.Random(f"{seed}/reward_model")  # noqa: S311 - an order, not a secret
        pairs = verified_pairs(sequences, rng, self.config.pairs, self.config.equal_length)
        order: list[list[Sequence]] = []
        for _ in range(self.config.epochs):
            rng.shuffle(pairs)
            order += pairs
        return order

    def marked(self, unit: list[Sequence]) -> list[Sequence]:
        """Let only the last token of an answer carry loss."""
        return [replace(s, mask=[False] * (len(s.completion) - 1) + [True]) for s in unit]

    def weights(self, tokens: Tokens, max_tokens: int) -> Tensor:
        """Return 1/P for P pairs."""
        return torch.full_like(tokens.advantage, 2.0 / len(tokens.lengths))

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return the mean of log σ(R⁺ − R⁻); `logp` holds the scores."""
        return (tokens.weight[tokens.sign > 0] * logsigmoid(_margin(tokens, logp))).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return ±σ(R⁻ − R⁺)."""
        strength = torch.sigmoid(-_margin(tokens, logp))
        found = torch.zeros_like(logp)
        found[tokens.sign > 0] = strength
        found[tokens.sign < 0] = -strength
        return found

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return margin, accuracy and calibration error."""
        margin = _margin(tokens, logp)
        return {
            "margin": float(margin.mean()),
            "accuracy": float((margin > 0).to(margin.dtype).mean()),
            "calibration_error": calibration_error(margin),
        }


def calibration_error(margin: Tensor) -> float:
    """Return the expected calibration error of σ(|R⁺ − R⁻|), 0 … ½.

    Args:
        margin: [P], R⁺ − R⁻.
    """
    said = torch.sigmoid(margin.abs()).double()
    order = torch.argsort(said)
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    gaps = [
        abs(float(said[part].mean() - right[part].mean())) * len(part)
        for part in torch.tensor_split(order, min(BINS, len(order)))
    ]
    return sum(gaps) / len(order)


def _margin(tokens: Tokens, scores: Tensor) -> Tensor:
    """Return R⁺ − R⁻ of each pair, [P]: both sides come in the same order, a token each."""
    return scores[tokens.sign > 0] - scores[tokens.sign < 0]


def create(config: Config) -> RewardModel:
    """Return the method."""
    return RewardModel(config)
