"""Which converted rows make the mixture: duplicates out, exact counts, a split by problem.

Everything here works on arrays of keys, not on texts, so that a million rows take a few hundred
MB. Precedence decides between copies and between candidates: sources in the order of the
configuration, rows within a source by a seeded hash of their number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_prep.candidates import Candidates
from data_prep.near import near_duplicates


@dataclass
class Selection:
    """The rows of the mixture, as indices into the candidates.

    Attributes:
        train: In order of precedence.
        validation: Likewise.
        available: Rows of each source that were left after duplicates.
        asked: Rows asked of each source; 0 for all.
        duplicates: Removed rows by "<exact | near>, <source>, also in <source>".
        pairs: Some removed near-duplicates with the row that stayed, for the report.
    """

    train: np.ndarray
    validation: np.ndarray
    available: list[int]
    asked: list[int]
    duplicates: dict[str, int]
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def missing(self) -> list[int]:
        """Return how many rows each source is short of what was asked."""
        return [max(0, a - have) for a, have in zip(self.asked, self.available, strict=True)]


def select(
    candidates: Candidates,
    names: list[str],
    asked: list[int],
    validation_rows: int,
    threshold: float,
    seed: int,
) -> Selection:
    """Choose the rows of a mixture.

    Args:
        candidates: All converted rows.
        names: Names of the sources.
        asked: Rows asked of each; 0 takes all that are left.
        validation_rows: Rows held out.
        threshold: Least similarity of near-duplicates; 0 looks for none.
        seed: Decides which problems are held out.
    """
    order = np.lexsort((candidates.number, candidates.rank, candidates.source))
    duplicates: Counter[str] = Counter()
    order = _without_copies(candidates, order, names, duplicates)
    pairs: list[tuple[int, int]] = []
    if threshold:
        found = near_duplicates(
            candidates.signature[order], candidates.numbers_key[order], threshold
        )
        for row, first in found.items():
            _count(duplicates, "near", candidates, names, order[row], order[first])
        pairs = [(int(order[row]), int(order[first])) for row, first in sorted(found.items())[:50]]
        order = np.delete(order, sorted(found))
    chosen, available = [], []
    for source, count in enumerate(asked):
        own = order[candidates.source[order] == source]
        available.append(len(own))
        chosen.append(own[:count] if count else own)
    mixture = np.concatenate(chosen)
    held_out = _held_out(candidates, mixture, validation_rows, seed)
    return Selection(
        train=mixture[~held_out],
        validation=mixture[held_out],
        available=available,
        asked=asked,
        duplicates=dict(sorted(duplicates.items())),
        pairs=pairs,
    )


def _without_copies(
    candidates: Candidates, order: np.ndarray, names: list[str], duplicates: Counter[str]
) -> np.ndarray:
    """Keep the first row of each normalised text."""
    _, first, inverse = np.unique(
        candidates.text_key[order], return_index=True, return_inverse=True
    )
    kept_for = first[inverse]
    is_copy = kept_for != np.arange(len(order))
    for row in np.flatnonzero(is_copy):
        _count(duplicates, "exact", candidates, names, order[row], order[kept_for[row]])
    return order[~is_copy]


def _count(
    duplicates: Counter[str],
    how: str,
    candidates: Candidates,
    names: list[str],
    row: Any,
    kept: Any,
) -> None:
    one, other = names[candidates.source[row]], names[candidates.source[kept]]
    duplicates[f"{how}, {one}, also in {other}"] += 1


def _held_out(candidates: Candidates, mixture: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Return which rows of the mixture are held out: whole problems, in a seeded order.

    A problem is all rows that share a question or an original question, directly or through
    others. Problems larger than what is still wanted are passed over, so that the number comes
    out exact wherever single problems are left.
    """
    problem = _components(candidates.question_key[mixture], candidates.group_key[mixture])
    held_out = np.zeros(len(mixture), dtype=bool)
    if not rows:
        return held_out
    ids, inverse, sizes = np.unique(problem, return_inverse=True, return_counts=True)
    ranks = np.array(
        [xxhash.xxh3_64_intdigest(f"{seed}/validation/{key}".encode()) for key in ids.tolist()],
        dtype=np.uint64,
    )
    is_held = np.zeros(len(ids), dtype=bool)
    for index in np.argsort(ranks, kind="stable"):
        if sizes[index] <= rows:
            is_held[index] = True
            rows -= int(sizes[index])
            if not rows:
                break
    return is_held[inverse]


def _components(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Return a key a row, the same for rows that are connected through either key."""
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while (above := parent.get(key, key)) != key:
            parent[key] = parent.get(above, above)
            key = above
        return key

    linked = one != two
    for a, b in zip(one[linked].tolist(), two[linked].tolist(), strict=True):
        a, b = root(a), root(b)
        # The smaller key becomes the root, so that the order of rows has no say.
        parent[max(a, b)] = min(a, b)
    if not parent:
        return one.copy()
    return np.array([root(key) for key in one.tolist()], dtype=np.uint64)
