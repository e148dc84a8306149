"""Reads what the data stages wrote: shards of training sequences, preference pairs, steps."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError
from data_prep.schema import JUDGED_VERSION

# Rows among which length-grouped batches are formed: large enough for little padding, small
# enough that batches stay a random sample.
WINDOW = 4096


@dataclass(frozen=True)
class Batch:
    """Padded sequences, B sequences of T tokens.

    Attributes:
        input_ids: int32 [B, T]; padding is 0 and belongs to no document.
        mask: int8 [B, T]; 1 where the token carries loss (its own log-probability is trained).
        position_ids: int32 [B, T]; starts anew at 0 in every document.
        document_ids: int32 [B, T]; number of the document in its sequence from 0, -1 on padding.
            A token attends to the earlier tokens of its own document only.
        lengths: int32 [B]; tokens without padding.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray
    lengths: np.ndarray

    def attention_mask(self) -> np.ndarray:
        """Return which key (last axis) each query may see, bool [B, 1, T, T]."""
        same = self.document_ids[:, :, None] == self.document_ids[:, None, :]
        real = (self.document_ids >= 0)[:, :, None]
        steps = np.arange(self.input_ids.shape[1])
        return (same & real & (steps[:, None] >= steps[None, :]))[:, None]

    def cumulative_lengths(self) -> np.ndarray:
        """Return where documents start in the batch without padding: int32 [documents + 1].

        This is what variable-length attention kernels take.
        """
        starts = np.flatnonzero((self.position_ids == 0)[self.document_ids >= 0])
        return np.append(starts, int(self.lengths.sum())).astype(np.int32)


class Sequences:
    """The sequences of one split of a mixture, in training order.

    Args:
        stage: The mixture's folder.
        split: "train" or "validation".

    Raises:
        UserError: The folder has no whole set of shards of the split.
    """

    def __init__(self, stage: str | Path, split: str) -> None:
        """Map the shards; nothing is read yet."""
        paths = sorted(Path(stage).glob(f"{split}-*-of-*.arrow"))
        expected = int(paths[0].stem.rsplit("-", 1)[1]) if paths else 0
        if not paths or len(paths) != expected:
            raise UserError(
                str(stage), f"{len(paths)} of {expected or 'no'} shards of split {split!r}",
                "a complete mixture", "run python -m data_prep.mixture again; it goes on",
            )
        self._shards = [_Shard(path) for path in paths]
        self._ends = list(accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (input ids, mask, document starts) of a sequence, views of the mapped file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        return self._shards[shard].read(index - (self._ends[shard - 1] if shard else 0))

    def length(self, index: int) -> int:
        """Return the number of tokens of a sequence."""
        return len(self[index][0])

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches of `size` sequences in training order, the last one smaller.

        Args:
            size: Sequences a batch.
            start: First batch, for a run that goes on.
        """
        for first in range(start * size, len(self), size):
            yield self.collate(range(first, min(first + size, len(self))))

    def length_grouped(self, tokens: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches of sequences of like lengths, in a seeded order.

        Within each window of sequences in training order, the ones of like lengths share a
        batch; the batches of a window come in random order.

        Args:
            tokens: Most tokens of a batch, padding included (a longer sequence is alone).
            seed: Decides the order of batches.
            start: First batch, for a run that goes on.
        """
        plan = (group for window in range(0, len(self), WINDOW)
                for group in self._groups(window, tokens, seed))
        for number, group in enumerate(plan):
            if number >= start:
                yield self.collate(group)

    def _groups(self, window: int, tokens: int, seed: int) -> list[list[int]]:
        members = range(window, min(window + WINDOW, len(self)))
        order = sorted(members, key=lambda index: (self.length(index), index))
        groups: list[list[int]] = [[]]
        for index in order:
            # In ascending order the newest is the longest, so it decides the padded width.
            if groups[-1] and (len(groups[-1]) + 1) * self.length(index) > tokens:
                groups.append([])
            groups[-1].append(index)
        random.Random(f"{seed}/{window}").shuffle(groups)  # noqa: S311 - an order, not a secret
        return groups

    def collate(self, indices: Sequence[int]) -> Batch:
        """Return the batch of some sequences, padded to the longest."""
        rows = [self[index] for index in indices]
        lengths = np.array([len(ids) for ids, _, _ in rows], dtype=np.int32)
        shape = (len(rows), int(lengths.max()))
        ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask, documents = np.zeros(shape, np.int8), np.full(shape, -1, np.int32)
        for row, (tokens, bits, starts) in enumerate(rows):
            count = len(tokens)
            ids[row, :count], mask[row, :count] = tokens, bits
            sizes = np.diff(starts, append=count)
            documents[row, :count] = np.repeat(np.arange(len(starts), dtype=np.int32), sizes)
            positions[row, :count] = np.arange(count, dtype=np.int32) - np.repeat(starts, sizes)
        return Batch(ids, mask, positions, documents, lengths)


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
                str(path), "no such file", f"the data stage's {kind}",
                f"give [data] a source of {kind} and run python -m data_prep.build",
            )
        try:
            table = pq.read_table(path, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                str(path), f"cannot be read: {error}", f"the data stage's {kind}",
                "remove the data folder and build again",
            ) from None
        version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
        if version != JUDGED_VERSION:
            raise UserError(str(path), f"schema version {version}", f"version {JUDGED_VERSION}",
                            "remove the data folder and build again")
        self._columns = []
        for name in columns:
            lists = table[name].combine_chunks()
            self._columns.append((lists.offsets.to_numpy(), lists.values.to_numpy()))
        self._rows = table.num_rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._rows

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
        table = pa.ipc.open_file(self._file).read_all()
        self._columns = {}
        for name in ("input_ids", "mask", "starts"):
            lists = table[name].chunk(0)
            self._columns[name] = (lists.offsets.to_numpy(), lists.values.to_numpy())
        self._rows = table.num_rows

    def __len__(self) -> int:
        return self._rows

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, mask, starts = (
            values[offsets[row] : offsets[row + 1]] for offsets, values in self._columns.values()
        )
        return ids, mask, starts
