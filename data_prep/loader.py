"""Reads what the data stages wrote: shards of training sequences, preference pairs, steps."""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import shards
from data_prep.errors import UserError
from data_prep.schema import JUDGED_VERSION

# Rows among which length-grouped batches are formed: large enough for little padding, small
# enough that batches stay a random sample.
WINDOW = 4096


class Document(NamedTuple):
    """One training row.

    Attributes:
        input_ids: int32 [T].
        mask: int8 [T]; 1 where the token carries loss (its own log-probability is trained).
    """

    input_ids: np.ndarray
    mask: np.ndarray


class Sequences:
    """Training rows of one split of a data or mixture stage, memory-mapped.

    A sequence is one document, or several that were packed; sequences stand in training order.
    A document is a row of its own whatever it was packed with: its positions start at 0 and it
    attends to nothing but itself.

    Args:
        stage: The stage's folder.
        split: "train" or "validation".

    Raises:
        UserError: The folder has no whole set of shards of the split.
    """

    def __init__(self, stage: str | Path, split: str) -> None:
        """Map the shards; nothing is read yet."""
        paths = sorted(Path(stage).glob(f"{split}-*-of-*.arrow"))
        expected = int(paths[0].stem.rsplit("-", 1)[1]) if paths else 0
        if not paths or len(paths) != expected:
            # A run's folder in place of a stage's.
            below = sorted({str(path.parent) for path in Path(stage).glob(f"*/{split}-*.arrow")})
            again = "run python -m data_prep.build (or .mixture) with this file; it goes on"
            raise UserError(
                str(stage),
                f"{f'{len(paths)} of {expected}' if paths else 'no'} shards of split {split!r}",
                "a complete data or mixture stage with supervised rows",
                f"name {' or '.join(below)}" if below else again,
            )
        self._shards = [_Shard(path) for path in paths]
        self._ends = list(accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> list[Document]:
        """Return the documents of a sequence, views of the mapped file."""
        shard, row = self._find(index)
        return shard.documents(row)

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of the configuration."""
        return self._shards[0].names

    def origins(self, index: int) -> list[tuple[str, int]]:
        """Return of each document of a sequence its source, and its row's number there."""
        shard, row = self._find(index)
        return shard.origins(row)

    def _find(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self._shards[number], index - (self._ends[number - 1] if number else 0)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32."""
        return np.concatenate([shard.lengths() for shard in self._shards])

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(shard.longest() for shard in self._shards)

    def length_grouped(self, tokens: int, seed: int) -> list[list[int]]:
        """Return the sequences of each batch, those of a batch of like lengths.

        Within each window of sequences in training order, the ones of like lengths share a
        batch; the batches of a window come in seeded order.

        Args:
            tokens: Most tokens of a batch when it is padded to its longest sequence (a longer
                sequence is alone).
            seed: Decides the order of batches.
        """
        lengths = self.lengths
        return [
            group
            for window in range(0, len(self), WINDOW)
            for group in _groups(lengths[window : window + WINDOW], window, tokens, seed)
        ]


def _groups(lengths: np.ndarray, first: int, tokens: int, seed: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for offset in np.argsort(lengths, kind="stable").tolist():
        # In ascending order the newest is the longest, so it decides the padded width.
        if groups[-1] and (len(groups[-1]) + 1) * int(lengths[offset]) > tokens:
            groups.append([])
        groups[-1].append(first + offset)
    random.Random(f"{seed}/{first}").shuffle(groups)  # noqa: S311 - an order, not a secret
    return groups


class Pair(NamedTuple):
    """A tokenised preference pair; see `data_prep.schema.Preference` for the columns.

    Attributes:
        prompt: What both answers follow.
        chosen: The preferred answer, end tokens included.
        rejected: The other one.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class StepRow(NamedTuple):
    """A tokenised solution with labelled steps; see `data_prep.schema.LabelledSteps`.

    Attributes:
        prompt: What the solution follows.
        completion: The solution, end tokens included.
        step_ends: Index in `completion` of the last token of each labelled step, ascending.
        labels: 1 good, 0 bad; one for each of `step_ends`.
    """

    prompt: list[int]
    completion: list[int]
    step_ends: list[int]
    labels: list[int]


class _Lists:
    """The list columns of a data stage's Parquet file, rows by index."""

    def __init__(self, path: str | Path, kind: str, columns: Sequence[str]) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(
                str(path),
                "no such file",
                f"the data stage's {kind}",
                f"give [data] a source of {kind} and run python -m data_prep.build",
            )
        try:
            table = pq.read_table(path, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                str(path),
                f"cannot be read: {error}",
                f"the data stage's {kind}",
                "remove the data folder and build again",
            ) from None
        version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
        if version != JUDGED_VERSION:
            raise UserError(
                str(path),
                f"schema version {version}",
                f"version {JUDGED_VERSION}",
                "remove the data folder and build again",
            )
        self._names, self._columns = columns, []
        for name in columns:
            lists = table[name].combine_chunks()
            self._columns.append((lists.offsets.to_numpy(), lists.values.to_numpy()))
        self._rows = table.num_rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._rows

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer, 0 where there are no rows."""
        widths = dict(zip(self._names, (np.diff(at) for at, _ in self._columns), strict=True))
        answers = [widths[name] for name in ("chosen", "rejected", "completion") if name in widths]
        return max(int((widths["prompt"] + answer).max(initial=0)) for answer in answers)

    def _row(self, index: int) -> list[list[int]]:
        if not 0 <= index < self._rows:
            raise IndexError(index)
        return [values[at[index] : at[index + 1]].tolist() for at, values in self._columns]


class Pairs(_Lists):
    """Preference pairs of one split, in the order of their sources.

    Args:
        path: `preference_<split>.parquet` of a data stage.

    Raises:
        UserError: The file is not there, or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file."""
        super().__init__(path, "preference pairs", Pair._fields)

    def __getitem__(self, index: int) -> Pair:
        """Return a pair."""
        return Pair(*self._row(index))


class Steps(_Lists):
    """Solutions with labelled steps of one split, in the order of their sources.

    Args:
        path: `steps_<split>.parquet` of a data stage.

    Raises:
        UserError: The file is not there, or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file."""
        super().__init__(path, "labelled steps", StepRow._fields)

    def __getitem__(self, index: int) -> StepRow:
        """Return a solution."""
        return StepRow(*self._row(index))


class _Shard:
    """One memory-mapped file; lists are sliced from flat arrays without copies."""

    def __init__(self, path: Path) -> None:
        self._file = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_file(self._file).read_all()
        except pa.ArrowInvalid as error:
            raise UserError(
                str(path),
                f"cannot be read: {error}",
                "a shard of training sequences",
                "remove the stage's folder and build again",
            ) from None
        metadata = table.schema.metadata or {}
        version = metadata.get(b"schema_version", b"none").decode()
        if version != shards.VERSION:
            raise UserError(
                str(path),
                f"schema version {version}",
                f"version {shards.VERSION}",
                "remove the stage's folder and build again",
            )
        self.names: list[str] = json.loads(metadata[b"sources"])
        self._columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in shards.SCHEMA.names:
            lists = table[name].combine_chunks()
            self._columns[name] = (lists.offsets.to_numpy(), lists.values.to_numpy())
        self._rows = table.num_rows

    def __len__(self) -> int:
        return self._rows

    def _row(self, name: str, row: int) -> np.ndarray:
        offsets, values = self._columns[name]
        return values[offsets[row] : offsets[row + 1]]

    def documents(self, row: int) -> list[Document]:
        ids, mask = self._row("input_ids", row), self._row("mask", row)
        borders = pairwise([*self._row("starts", row).tolist(), len(ids)])
        return [Document(ids[start:stop], mask[start:stop]) for start, stop in borders]

    def origins(self, row: int) -> list[tuple[str, int]]:
        sources, numbers = self._row("source", row).tolist(), self._row("number", row).tolist()
        return [(self.names[s], number) for s, number in zip(sources, numbers, strict=True)]

    def lengths(self) -> np.ndarray:
        return np.diff(self._columns["input_ids"][0])

    def longest(self) -> int:
        # A document ends where the next one starts, or with its sequence.
        first, starts = self._columns["starts"]
        tokens = self._columns["input_ids"][0]
        base = np.repeat(tokens[:-1], np.diff(first))
        return int(np.diff(np.append(base + starts, tokens[-1])).max(initial=0))
