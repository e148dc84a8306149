"""Random numbers that belong to a sample, not to a batch.

The uniform number behind token t of a sample is a hash of the sample's seed and t, so it does
not depend on which other samples run beside it, nor on how many were drawn before.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11))


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Return one float64 in [0, 1) for every (seed, counter).

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied twice so that
    neighbouring counters of neighbouring seeds share nothing.

    Args:
        seeds: [B] of uint64.
        counters: [B] of uint64.
    """
    with np.errstate(over="ignore"):
        z = _finalise(seeds + _GOLDEN)
        z = _finalise(z ^ (counters + np.uint64(1)) * _GOLDEN)
    return (z >> _SHIFTS[3]).astype(np.float64) * 2.0**-53


def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> _SHIFTS[0])) * _MIX[0]
    z = (z ^ (z >> _SHIFTS[1])) * _MIX[1]
    return z ^ (z >> _SHIFTS[2])
