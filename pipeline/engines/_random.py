"""Random numbers that belong to a sample, not to a batch.

The uniform number behind token t of a sample is a hash of the sample's seed and t, so it does
not depend on which other samples run beside it, nor on how many were drawn before.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Unsigned 64-bit constants as the signed numbers of the same bits: torch's integers wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def seed_states(seeds: Tensor) -> Tensor:
    """Return what `uniforms` takes in the place of seeds, hashed once; [B] of int64."""
    return _finalise(seeds + _GOLDEN)


def uniforms(states: Tensor, counters: Tensor) -> Tensor:
    """Return one float64 in [0, 1) for every (seed, counter).

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied twice so that
    neighbouring counters of neighbouring seeds share nothing.

    Args:
        states: [B] of int64, from `seed_states`.
        counters: [B] of int64, from 0.
    """
    z = _finalise(states ^ ((counters + 1) * _GOLDEN))
    return _shift(z, 11).double().mul_(2.0**-53)


def _finalise(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)).mul_(_MIX[0])
    z = (z ^ _shift(z, 27)).mul_(_MIX[1])
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return torch.bitwise_right_shift(z, bits).bitwise_and_((1 << (64 - bits)) - 1)
