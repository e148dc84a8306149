"""Near-duplicates by MinHash: texts that share most of their word 5-grams and all their numbers.

Signatures come from `datasketch`; rows of all shards are then compared band by band in sorted
arrays, which takes a few hundred MB for a million rows where tables of buckets would take several
GB. Two problems that differ in a number are two problems, however alike they read: the numbers
of a text take part in every band.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xxhash

# 10 bands of 6: two texts of Jaccard similarity 0.85 meet with probability 0.99, of 0.5 with 0.15.
BANDS, BAND_ROWS = 10, 6
PERMUTATIONS = BANDS * BAND_ROWS
SHINGLE = 5
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def key(text: str) -> int:
    """Return 64 bits that stand for a text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def numbers_key(normal: str) -> int:
    """Return 64 bits that stand for the numbers of a normalised text, in order."""
    return key(" ".join(_NUMBER.findall(normal)))


def signatures(normals: Sequence[str]) -> np.ndarray:
    """Return MinHash signatures of normalised texts.

    Args:
        normals: Texts as `data_prep.normalise` returns them.

    Returns:
        uint32 [texts, PERMUTATIONS].
    """
    # Here and not above: only mixtures need datasketch.
    from datasketch import MinHash

    if not normals:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    shingles = [_shingles(normal) for normal in normals]
    hashes = MinHash.bulk(shingles, num_perm=PERMUTATIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)
    return np.stack([signature.hashvalues for signature in hashes]).astype(np.uint32)


def _shingles(normal: str) -> list[bytes]:
    words = normal.encode("utf-8", "surrogatepass").split()
    last = max(1, len(words) - SHINGLE + 1)
    return [b" ".join(words[start : start + SHINGLE]) for start in range(last)]


def near_duplicates(signature: np.ndarray, numbers: np.ndarray, threshold: float) -> dict[int, int]:
    """Return the rows that nearly repeat an earlier row.

    In each band, rows that agree are compared with the first of them.

    Args:
        signature: uint32 [rows, PERMUTATIONS], in order of precedence.
        numbers: uint64 [rows], see `numbers_key`.
        threshold: Least estimated Jaccard similarity.

    Returns:
        Row to the earlier row that it nearly repeats.
    """
    found: dict[int, int] = {}
    for band in range(BANDS):
        part = signature[:, band * BAND_ROWS : (band + 1) * BAND_ROWS].astype(np.uint64)
        bucket = numbers.copy()
        for column in part.T:
            # A multiplicative hash of 64 bits, column after column; overflow is meant.
            bucket = (bucket ^ column) * np.uint64(0x9E3779B97F4A7C15)
            bucket ^= bucket >> np.uint64(29)
        order = np.argsort(bucket, kind="stable")
        ordered = bucket[order]
        is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        leader = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        rest = ~is_first
        rows, leaders = order[rest], leader[rest]
        alike = (signature[rows] == signature[leaders]).mean(axis=1) >= threshold
        for row, first in zip(rows[alike].tolist(), leaders[alike].tolist(), strict=True):
            found.setdefault(row, first)
    return found
