"""Direct preference optimisation on pairs (o⁺ preferred, o⁻ not).

D: a correct and an incorrect sample of one prompt, drawn from π_sft, or human preference pairs.

With h = Σ_t log(π_θ/π_ref), or its mean over tokens for `length_norm = true`:

    J    = E log σ(β (h⁺ − h⁻))
    GC⁺  = +β σ(β (h⁻ − h⁺)),   GC⁻ = −β σ(β (h⁻ − h⁺))

Source: 002_…, 003_… (sum); 000_… eq. 8 (mean). Deviation: 000_… eq. 10 and 004_… eq. 7 leave out
the leading β and write the ratios per token inside σ; the derivative of the objective has the
factor β and sequence-level ratios, and that is what stands here. Known value: at π_θ = π_ref the
loss is log 2 and GC = ±β/2. Swapping a pair flips every sign.
"""

from __future__ import annotations

import random
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.batch import Sequence, Tokens
from pipeline.methods import Method, MethodConfig
from pipeline.pairs import verified_pairs


class Config(MethodConfig):
    """Settings of DPO.

    Attributes:
        normaliser: Always a mean over pairs.
        data: A log of verified "samples", or the data stage's preference "pairs".
        beta: Strength of the pull towards the reference, > 0.
        length_norm: Mean instead of sum of log-ratios.
        pairs: Most pairs of one prompt, from samples.
        equal_length: Prefer pairs of nearly equal length, against length bias.
        epochs: Passes over the pairs, from samples; elsewhere `steps` says how far to go.
    """

    kind: str = "dpo"
    normaliser: Literal["sequence"] = "sequence"  # type: ignore[assignment]
    data: Literal["samples", "pairs"] = "samples"
    beta: float = Field(default=0.1, gt=0.0)
    length_norm: bool = False
    pairs: int = Field(default=1, ge=1)
    equal_length: bool = False
    epochs: int = Field(default=1, ge=1)


class Dpo(Method):
    """Prefer correct to incorrect samples of the same prompt."""

    reference = True
    config: Config

    def __init__(self, config: Config) -> None:
        """Take the source that the config names."""
        super().__init__(config)
        self.source = config.data

    def select(self, sequences: list[Sequence], seed: int) -> list[list[Sequence]]:
        """Return pairs [correct, incorrect], in `epochs` seeded permutations."""
        rng = random.Random(f"{seed}/dpo")  # noqa: S311 - an order, not a secret
        pairs = verified_pairs(sequences, rng, self.config.pairs, self.config.equal_length)
        order: list[list[Sequence]] = []
        for _ in range(self.config.epochs):
            rng.shuffle(pairs)
            order += pairs
        return order

    def weights(self, tokens: Tokens, max_tokens: int) -> Tensor:
        """Return 1/P for P pairs, divided by |o| where log-ratios are averaged."""
        per_sequence = torch.full_like(tokens.lengths, 2.0 / len(tokens.lengths))
        if self.config.length_norm:
            per_sequence = per_sequence / tokens.lengths
        return per_sequence[tokens.sequence]

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return the sum over pairs of log σ(β(h⁺ − h⁻)) / P."""
        first = tokens.sign > 0
        share = self._pair_share(tokens)[first]
        return (share * logsigmoid(self._margin(tokens, logp))).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return ±β σ(−margin) on the tokens of the two sides."""
        strength = self.config.beta * torch.sigmoid(-self._margin(tokens, logp))
        signed = torch.zeros_like(tokens.sign)
        signed[tokens.sign > 0] = strength
        signed[tokens.sign < 0] = -strength
        return signed[tokens.sequence]

    def _margin(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return β(h⁺ − h⁻) for each pair, [P]: both sides come in the same order."""
        if tokens.ref_logp is None:
            raise ValueError("DPO needs reference log-probs")
        h = tokens.per_sequence(logp - tokens.ref_logp)
        if self.config.length_norm:
            h = h / tokens.lengths
        return self.config.beta * (h[tokens.sign > 0] - h[tokens.sign < 0])

    def _pair_share(self, tokens: Tokens) -> Tensor:
        """Return 1/P of the whole step, [N], read back from the weights."""
        share = torch.zeros_like(tokens.lengths).index_copy(0, tokens.sequence, tokens.weight)
        return share * tokens.lengths if self.config.length_norm else share

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return the mean margin and the share of pairs that are ranked right."""
        margin = self._margin(tokens, logp)
        return {
            "margin": float(margin.mean()),
            "accuracy": float((margin > 0).to(margin.dtype).mean()),
        }


def create(config: Config) -> Dpo:
    """Return the method."""
    return Dpo(config)
