"""Tokenised rows: encoded in batches, held flat, written as Parquet in training order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.formatting import Formatter, Message
from data_prep.preflight import ROWS, preflight
from data_prep.schema import Problem

BATCH = 4096
SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("source", pa.string()),
        ("style", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.int8())),
    ],
    metadata={"schema_version": "1"},
)


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


def write_parquet(
    path: Path, problems: Sequence[Problem], pairs: TokenisedPairs, order: Sequence[int],
) -> None:
    """Write the pairs that `order` names, in its order, row group by row group."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            named = [(problems[pairs.keys[i][0]], pairs.keys[i][1]) for i in chosen]
            writer.write_table(
                pa.table(
                    [
                        pa.array([problem.id for problem, _ in named]),
                        pa.array([problem.source for problem, _ in named]),
                        pa.array([style for _, style in named]),
                        _lists([pairs.ids[i] for i in chosen]),
                        _lists([pairs.masks[i] for i in chosen]),
                    ],
                    schema=SCHEMA,
                )
            )
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
