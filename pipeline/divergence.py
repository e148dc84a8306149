"""Estimates of the divergence between policy and reference from sampled tokens.

With d = log π_θ − log π_ref at a sampled token:

    k1 = d                 E_π k1 = KL(π‖ref);  E_π ∇k1 = 0, so k1 is no loss term
    k2 = d² / 2            E_π ∇k2 = ∇KL(π‖ref) at the states that were visited
    k3 = exp(−d) + d − 1   E_π ∇k3 = ∇KL(ref‖π) at those states; E_π k3 = KL(π‖ref)

k1 enters as a reward: −k1 summed over the tokens from t on weighs ∇ log π at t, and that is the
gradient of the whole sequence's KL(π‖ref), the part through later states included.

d is never clamped: a clamp silently zeroes the gradient (at d = −3, k3 = 16.1).

Source: 000_… eq. 15 to 17 and 003_… (k3); methods.md sections 5 and 6 (k1, k2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.batch import Tokens

Estimator = Literal["k1", "k2", "k3"]


def estimate(kind: Estimator, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return the estimate at every token, [T].

    Args:
        kind: Which one.
        logp: log π_θ, [T].
        ref_logp: log π_ref, [T].
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2.0
    return torch.exp(-d) + d - 1.0


def figures(tokens: Tokens, logp: Tensor) -> dict[str, float]:
    """Return the means of all three over the tokens, nats a token.

    Returns:
        update_kl_k1 … k3: of the policy that the last update on a batch begins with to π_old; 0
        where that is the only update, on samples of the same policy.
        kl_k1 … k3: to the reference, where there is one.
    """
    found = {}
    for prefix, other in (("update_kl", tokens.old_logp), ("kl", tokens.ref_logp)):
        if other is not None:
            for kind in ("k1", "k2", "k3"):
                found[f"{prefix}_{kind}"] = float(estimate(kind, logp, other).mean())
    return found


def slope(kind: Literal["k2", "k3"], logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return ∂k/∂log π_θ at every token, [T]: d for k2, 1 − π_ref/π_θ for k3."""
    d = logp - ref_logp
    return d if kind == "k2" else 1.0 - torch.exp(-d)
