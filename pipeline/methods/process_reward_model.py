"""Process reward model: is the solution right up to the end of this step?

    J  = (1/Z) Σ_steps [ y log σ(R) + (1 − y) log σ(−R) ]
    GC = y − σ(R)

R_φ is read after the token that ends a step; y is the step's label, 1 or 0. Steps without a label
(neutral, not judged) carry no loss. D: labelled steps of the data stage. Known value: at R = 0 the
loss is log 2 and GC is ±½.

Source: methods.md section 4. The normaliser is "token" (a mean over labelled steps); "sequence"
weighs every solution alike.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.batch import Tokens
from pipeline.methods import MethodConfig
from pipeline.methods._scores import Scores
from pipeline.normaliser import Normaliser


class Config(MethodConfig):
    """Settings of the process reward model.

    Attributes:
        updates: Always 1.
    """

    kind: str = "process_reward_model"
    normaliser: Normaliser = "token"
    updates: int = Field(default=1, ge=1, le=1)


class ProcessRewardModel(Scores):
    """Classify steps."""

    source = "steps"

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
