"""Preference pairs from verified groups: one correct and one incorrect sample of a prompt."""

from __future__ import annotations

import random
from collections import defaultdict

from pipeline.batch import Sequence


def verified_pairs(
    sequences: list[Sequence], rng: random.Random, most: int, equal_length: bool = False
) -> list[list[Sequence]]:
    """Return pairs [correct, incorrect] with signs +1 and −1.

    Args:
        sequences: Samples with verdicts; those without one take no part.
        rng: Decides which samples meet.
        most: Most pairs of one group.
        equal_length: Prefer pairs of nearly equal length, against length bias; a sample may then
            stand in several.
    """
    sides: dict[int, tuple[list[Sequence], list[Sequence]]] = defaultdict(lambda: ([], []))
    for sequence in sequences:
        if sequence.correct is not None:
            sides[sequence.group][0 if sequence.correct else 1].append(sequence)
    pairs: list[list[Sequence]] = []
    for good, bad in sides.values():
        rng.shuffle(good)
        rng.shuffle(bad)
        both = list(zip(good, bad, strict=False))
        if equal_length:
            everything = [(g, b) for g in good for b in bad]
            both = sorted(
                everything, key=lambda p: abs(len(p[0].completion) - len(p[1].completion))
            )
        pairs += [[chosen.signed(+1), rejected.signed(-1)] for chosen, rejected in both[:most]]
    return pairs
