"""Process reward model: is the solution right up to the end of this step?

    J  = (1/Z) Σ_steps [ y log σ(R) + (1 − y) log σ(−R) ]
    GC = y − σ(R)

R_φ is read after the token that ends a step; y is the step's label, 1 or 0. Steps without a label
(neutral, not judged) carry no loss. D: labelled steps of the data stage, or lines of verified
samples, labelled by the equations in them (`verifiers.checkers.steps`). Known value: at R = 0 the
loss is log 2 and GC is ±½.

Source: methods.md section 4. The normaliser is "token" (a mean over labelled steps); "sequence"
weighs every solution alike.
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
from pipeline.normaliser import Normaliser


class Config(MethodConfig):
    """Settings of the process reward model.

    Attributes:
        data: Labelled "steps" of the data stage, or a log of verified "samples", whose lines are
            labelled by the equations in them and whose end by the verdict.
        epochs: Passes over the samples.
        updates: Always 1.
    """

    kind: str = "process_reward_model"
    data: Literal["steps", "samples"] = "steps"
    epochs: int = Field(default=1, ge=1)
    normaliser: Normaliser = "token"
    updates: int = Field(default=1, ge=1, le=1)


class ProcessRewardModel(Scores):
    """Classify steps."""

    config: Config

    def __init__(self, config: Config) -> None:
        """Take the source that the config names."""
        super().__init__(config)
        self.source = config.data
        self.takes_steps = True

    def select(self, sequences: list[Sequence], seed: int) -> list[list[Sequence]]:
        """Return the judged samples that have a step, in `epochs` seeded permutations.

        A step is good where all its equations hold, and the end where the verdict is "correct".
        A completion without an end token may end with a step's last token: the verdict holds.
        """
        units = []
        for sequence in sequences:
            last = len(sequence.completion) - 1
            labels = [
                (end, float(bool(sequence.correct) if end == last else value >= 1.0))
                for end, value in sequence.steps
            ]
            ends = {end for end, _ in labels}
            mask = [place in ends for place in range(len(sequence.completion))]
            if labels and sequence.correct is not None:
                units.append([replace(sequence, steps=labels, mask=mask)])
        rng = random.Random(f"{seed}/process_reward_model")  # noqa: S311 - an order, not a secret
        order: list[list[Sequence]] = []
        for _ in range(self.config.epochs):
            rng.shuffle(units)
            order += units
        return order

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return minus the binary cross-entropy; `logp` holds the scores."""
        label = tokens.step_reward
        each = label * logsigmoid(logp) + (1.0 - label) * logsigmoid(-logp)
        return (tokens.weight * each).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return y − σ(R)."""
        return tokens.step_reward - torch.sigmoid(logp)

    def figures(self, tokens: Tokens, logp: Tensor) -> dict[str, float]:
        """Return the share of steps judged right, and what was said of good and bad ones."""
        good = tokens.step_reward > 0.5
        said = torch.sigmoid(logp)
        figures = {"accuracy": float(((said > 0.5) == good).to(said.dtype).mean())}
        for name, chosen in (("good", good), ("bad", ~good)):
            if bool(chosen.any()):
                figures[f"said_of_{name}"] = float(said[chosen].mean())
        return figures


def create(config: Config) -> ProcessRewardModel:
    """Return the method."""
    return ProcessRewardModel(config)
