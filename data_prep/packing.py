"""Packing: rows into sequences of one length, by best-fit decreasing.

Each row goes whole into the sequence with the least room that still holds it, the longest rows
first. Nothing is cut, and boundaries are kept, so that attention and positions stay within a
document.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack rows into sequences.

    Rooms are whole numbers up to `capacity`, so the sequences are kept by room, and a bit of one
    big integer says which rooms there are: finding the least room that holds a row is a shift
    and a lowest bit.

    Args:
        lengths: Tokens of each row.
        capacity: Tokens of a sequence.

    Returns:
        Rows of each sequence, in the order that they were packed.

    Raises:
        ValueError: A row is longer than a sequence.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row of {int(lengths.max())} tokens, more than {capacity}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            index = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[index].append(row)
        else:
            room, index = capacity, len(bins)
            bins.append([row])
        left = room - length
        if not by_room[left]:
            rooms |= 1 << left
        by_room[left].append(index)
    return bins


def training_sequences(
    lengths: Sequence[int] | np.ndarray, capacity: int, packing: str, seed: int
) -> list[list[int]]:
    """Return the rows of each training sequence, sequences in seeded order.

    Args:
        lengths: Tokens of each row.
        capacity: Tokens of a sequence.
        packing: "best_fit", or "none" for a row a sequence.
        seed: Decides the order of sequences, and of rows within one.
    """
    rng = random.Random(f"{seed}/sequences")  # noqa: S311 - an order, not a secret
    if packing == "none":
        sequences = [[row] for row in range(len(lengths))]
    else:
        sequences = best_fit(lengths, capacity)
        # Packed longest first; no row should always come first in its sequence.
        for sequence in sequences:
            rng.shuffle(sequence)
    rng.shuffle(sequences)
    return sequences


def efficiency(lengths: Sequence[int] | np.ndarray, sequences: int, capacity: int) -> float:
    """Return the share of sequence tokens that are rows' and not padding."""
    return float(np.sum(lengths)) / (sequences * capacity) if sequences else 0.0
