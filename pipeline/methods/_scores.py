"""What reward models share: the variable is R_φ after each token that carries loss.

The loop is the same as for a policy, with R_φ where log π_θ stands:

    J = −L(R_φ),   GC = −Z · ∂L/∂R_φ,   loss = − Σ sg(GC / Z) · R_φ
"""

from __future__ import annotations

from pipeline.methods import Method


class Scores(Method):
    """Trains a model with one scalar a state."""

    trains = "scores"
