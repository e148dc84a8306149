"""Tokenised rows: encoded in batches, written as shards in training order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.formatting import Formatter, Message
from data_prep.preflight import ROWS, preflight
from data_prep.schema import Problem
from data_prep.shards import Document, write_shards

BATCH = 4096
# Rows of one file.
SHARD = 65536


@dataclass(frozen=True)
class TokenisedPairs:
    """Every (problem, style), tokenised once.

    Attributes:
        keys: (index of the problem, style) of each pair.
        ids: Tokens of each pair, int32.
        masks: 1 on assistant tokens, int8; the shape of `ids`.
    """

    keys: list[tuple[int, str]]
    ids: list[np.ndarray]
    masks: list[np.ndarray]

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each pair, prompt and solution."""
        return np.array([len(row) for row in self.ids], dtype=np.int64)

    def read(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """Return (input ids int32, mask int8) of the pair that stands at `document.offset`."""
        return self.ids[document.offset], self.masks[document.offset]


def messages_of(question: str, solution: str) -> list[Message]:
    """Return a question and its solution as a conversation."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]


def tokenise(formatter: Formatter, problems: Sequence[Problem]) -> TokenisedPairs:
    """Tokenise every solution of every problem; the first rows pass preflight or none do.

    Raises:
        UserError: A first row's mask or tokens are not what the template means.
    """
    keys = [(index, style) for index, p in enumerate(problems) for style in p.solutions]
    pairs = TokenisedPairs(keys, [], [])
    for start in range(0, len(keys), BATCH):
        batch = [
            messages_of(problems[index].question, problems[index].solutions[style])
            for index, style in keys[start : start + BATCH]
        ]
        rows = formatter.conversations(batch)
        if start == 0:
            preflight(formatter, batch[:ROWS], rows[:ROWS])
        for ids, mask in rows:
            pairs.ids.append(np.array(ids, dtype=np.int32))
            pairs.masks.append(np.array(mask, dtype=np.int8))
    return pairs


def write_sequences(
    folder: Path,
    split: str,
    problems: Sequence[Problem],
    pairs: TokenisedPairs,
    order: Sequence[int],
) -> None:
    """Write the pairs that `order` names, in its order, a row a sequence.

    Args:
        folder: The stage's folder.
        split: "train" or "validation".
        problems: The split's problems; a row's number is its problem's, from 0.
        pairs: Their tokenised solutions.
        order: Index of each row's pair.
    """
    names = sorted({problem.source for problem in problems})
    documents = [
        Document("", index, len(ids), names.index(problems[problem].source), problem)
        for index, ((problem, _), ids) in enumerate(zip(pairs.keys, pairs.ids, strict=True))
    ]
    rows = [[index] for index in order]
    write_shards(folder, split, documents, rows, pairs, names, SHARD, workers=1)
