"""The part that SFT and RFT share: J = Σ w·logp, GC = 1, on rows that were chosen before."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.batch import Tokens
from pipeline.methods import Method


class Imitation(Method):
    """Maximum likelihood of the given completions; GC is 1 on each of their tokens.

    Source: 000_… eq. 1 and 2 (normaliser "sequence"); 002_… (normaliser "token").
    """

    def objective(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return Σ_t w_t · logp_t."""
        return (tokens.weight * logp).sum()

    def gradient_coefficient(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """Return 1 for every token."""
        return torch.ones_like(logp)
