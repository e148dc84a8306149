"""Truncated importance sampling between the sampler and the trainer.

Two programs compute the same policy's log-probs a little differently (kernels, precision). The
samples follow the sampler's; the trainer differentiates its own. The coefficient of token t of
sequence i is multiplied by

    token:     is_{i,t} = min( π_old(o_t) / π_sampler(o_t), C )
    sequence:  is_{i,t} = min( Π_s π_old(o_s) / π_sampler(o_s), C )   on all tokens of i

"sequence" is unbiased where C does not bind; "token" is not for more than one token, but its
spread does not grow with the length. π_old is the trainer's policy before the first update on a
batch, so the correction is a constant, and the ratio ρ = π_θ/π_old stays what it was.

With batches drawn ahead (`pipeline.ahead`) the sampler is the policy of s steps before. π_old
stays the trainer's policy before the first update on the batch, and the sampler's own log-probs,
recorded when it sampled, are the behaviour policy's: `is` then holds the sampler's rounding and
its staleness together, is · ρ = π_θ / π_sampler, and the clip bounds each update on the batch
rather than the age of the samples. This is the decoupled objective of Hilton et al. 2021
(arXiv:2110.00641) as AReaL uses it (Fu et al. 2025, arXiv:2505.24298, eq. 5). It needs no old
weights in the trainer and serves methods without a ratio too, which is why staleness is refused
without a correction. The other reading, π_old = π_sampler in ρ itself, would clip the very
samples that are stale.

Source: methods.md section 9.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from data_prep.config import Config
from pipeline.batch import Tokens


class CorrectionConfig(Config):
    """Settings of the correction.

    Attributes:
        kind: Over what the ratio is taken; "off" is 1 everywhere.
        cap: C, the largest weight.
    """

    kind: Literal["off", "token", "sequence"] = "off"
    cap: float = Field(default=2.0, ge=1.0)


def importance(tokens: Tokens, config: CorrectionConfig) -> Tensor:
    """Return `is` for every token, [T].

    Args:
        tokens: Whole sequences, with `old_logp` and `sampler_logp`.
        config: Which correction.
    """
    if config.kind == "off":
        return torch.ones_like(tokens.weight)
    return _ratio(tokens, config.kind).clamp(max=config.cap)


def gap_figures(tokens: Tokens, config: CorrectionConfig) -> dict[str, float]:
    """Return how far the trainer's log-probs are from the sampler's.

    Returns:
        sampler_gap_mean and sampler_gap_max, of |log π_old − log π_sampler|; sampler_kl, the
        mean of log π_sampler − log π_old, an estimate of KL(sampler‖trainer); with a correction
        also its mean weight and the share of weights that the cap holds.
    """
    gap = _old(tokens) - tokens.sampler_logp
    found = {
        "sampler_gap_mean": float(gap.abs().mean()),
        "sampler_gap_max": float(gap.abs().max()),
        "sampler_kl": float(-gap.mean()),
    }
    if config.kind != "off":
        ratio = _ratio(tokens, config.kind)
        found["correction_mean"] = float(ratio.clamp(max=config.cap).mean())
        found["correction_capped_share"] = float((ratio > config.cap).to(ratio.dtype).mean())
    return found


def _ratio(tokens: Tokens, kind: Literal["token", "sequence"]) -> Tensor:
    gap = _old(tokens) - tokens.sampler_logp
    if kind == "sequence":
        gap = tokens.per_sequence(gap)[tokens.sequence]
    return torch.exp(gap)


def _old(tokens: Tokens) -> Tensor:
    if tokens.old_logp is None:
        raise ValueError("the correction needs the log-probs of the behaviour policy")
    return tokens.old_logp
