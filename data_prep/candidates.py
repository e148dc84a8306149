"""All converted rows of a mixture, as arrays of what the selection looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import near
from data_prep.chunk import Task, read_report

COLUMNS = (
    "number",
    "rank",
    "text_key",
    "question_key",
    "group_key",
    "numbers_key",
    "length",
    "assistant",
)


@dataclass(frozen=True)
class Candidates:
    """All converted rows, one array an attribute; rows in any order.

    Attributes:
        source: Index of the source, int32.
        chunk: Index of the chunk, int32.
        row: Row within its chunk, int32.
        number: Row number in the source's file, int64.
        rank: Seeded hash that orders a source's rows, uint64.
        text_key: Of the whole normalised text, uint64.
        question_key: Of the first user turn, uint64.
        group_key: Of the problem that it is a rewrite of, uint64.
        numbers_key: Of the text's numbers, uint64.
        length: Tokens, int32.
        assistant: Tokens that carry loss, int32.
        signature: MinHash, uint32 [rows, permutations].
    """

    source: np.ndarray
    chunk: np.ndarray
    row: np.ndarray
    number: np.ndarray
    rank: np.ndarray
    text_key: np.ndarray
    question_key: np.ndarray
    group_key: np.ndarray
    numbers_key: np.ndarray
    length: np.ndarray
    assistant: np.ndarray
    signature: np.ndarray


def load_candidates(tasks: Sequence[Task]) -> tuple[Candidates, list[dict[str, Any]]]:
    """Read what the chunks left: their rows, and what each left out and found, in order."""
    kinds = list(dict.fromkeys(task.stretch.kind for task in tasks))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Candidates.__annotations__}
    reports = []
    for index, task in enumerate(tasks):
        report = read_report(task)
        report = {key: report[key] for key in ("rows", "reasons", "findings")}
        reports.append({"source": Path(task.stretch.kind).stem, **report})
        with pa.memory_map(str(task.folder / f"{task.name}.arrow")) as file:
            table = pa.ipc.open_file(file).read_all()
            for name in COLUMNS:
                columns[name].append(table[name].to_numpy())
            flat = table["signature"].combine_chunks().flatten().to_numpy()
            columns["signature"].append(flat.reshape(-1, near.PERMUTATIONS).copy())
        rows = table.num_rows
        columns["source"].append(np.full(rows, kinds.index(task.stretch.kind), dtype=np.int32))
        columns["chunk"].append(np.full(rows, index, dtype=np.int32))
        columns["row"].append(np.arange(rows, dtype=np.int32))
    return Candidates(**{name: np.concatenate(parts) for name, parts in columns.items()}), reports


def token_offsets(candidates: Candidates, chunks: int) -> np.ndarray:
    """Return where each row's tokens start in its chunk's files, int64."""
    # Rows are loaded chunk by chunk in order, so a running sum restarts at each chunk.
    ends = np.cumsum(candidates.length.astype(np.int64))
    starts = ends - candidates.length
    sizes = np.bincount(candidates.chunk, minlength=chunks)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    base = np.zeros(chunks, dtype=np.int64)
    base[sizes > 0] = starts[first[sizes > 0]]
    return starts - base[candidates.chunk]
