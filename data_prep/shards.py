"""Output shards: sequences of tokens with their documents, Arrow files that are memory-mapped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from data_prep.cluster import Cluster, ClusterConfig
from data_prep.files import Journal, file_hash, writing
from data_prep.progress import progress

VERSION = "1"
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.int8())),
        ("starts", pa.list_(pa.int32())),
        ("source", pa.list_(pa.int16())),
        ("number", pa.list_(pa.int64())),
    ]
)


class Document(NamedTuple):
    """Where one row's tokens lie.

    Attributes:
        chunk: Stem of the chunk's files.
        offset: First token in them.
        length: Tokens.
        source: Index of the source.
        number: Row number in the source's file.
    """

    chunk: str
    offset: int
    length: int
    source: int
    number: int


class TokenSource(Protocol):
    """Where the tokens of documents come from; `read` is called from several threads."""

    def read(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """Return (input ids int32, mask int8) of a document."""
        ...


class TokenFiles:
    """Reads rows at random from the chunks' flat files, without mapping them into memory."""

    def __init__(self, folder: Path) -> None:
        """Open nothing yet."""
        self.folder = folder
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """Return (input ids int32, mask int8) of a row."""
        ids = self._bytes(f"{document.chunk}.ids", 4 * document.offset, 4 * document.length)
        mask = self._bytes(f"{document.chunk}.mask", document.offset, document.length)
        return np.frombuffer(ids, dtype=np.int32), np.frombuffer(mask, dtype=np.int8)

    def _bytes(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:
            if name not in self._open:
                self._open[name] = os.open(self.folder / name, os.O_RDONLY)
        data = os.pread(self._open[name], size, offset)
        if len(data) != size:
            raise OSError(f"{self.folder / name}: {len(data)} bytes at {offset}, expected {size}")
        return data

    def __reduce__(self) -> tuple[type[TokenFiles], tuple[Path]]:
        """Pickle without open files, for a process of another machine."""
        return type(self), (self.folder,)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def write_shards(
    folder: Path,
    split: str,
    documents: Sequence[Document],
    sequences: Sequence[Sequence[int]],
    tokens: TokenSource,
    names: Sequence[str],
    size: int,
    workers: int,
    cluster: ClusterConfig | None = None,
) -> None:
    """Write the shards of a split that are not there yet.

    Args:
        folder: The stage's folder.
        split: "train" or "validation".
        documents: The split's rows.
        sequences: Rows of each sequence, sequences in training order.
        tokens: Where the rows' tokens come from.
        names: Names of the sources.
        size: Sequences a shard.
        workers: Threads; the work is copying bytes, which needs no processes of its own.
        cluster: Ray workers that do it, through their own machines' disks and networks; None for
            this process.
    """
    # A split without rows has one empty shard: what is missing is then never taken for empty.
    count = max(1, -(-len(sequences) // size))
    journal = Journal(folder)

    paths = [folder / f"{split}-{index:05d}-of-{count:05d}.arrow" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not journal.holds(path)]

    def rows_of(index: int) -> list[list[Document]]:
        chosen = sequences[index * size : (index + 1) * size]
        return [[documents[row] for row in one] for one in chosen]

    with progress(f"write {split}", "shard", count, count - len(missing), hidden=count < 2) as bar:
        if cluster is not None:
            with Cluster(cluster, partial(_writer, tokens, names)) as pool:
                for done, found in pool.map((paths[i], rows_of(i)) for i in missing):
                    journal.note(paths[missing[done]], found=found)
                    bar.update()
            return

        def write(index: int) -> None:
            write_shard(paths[index], rows_of(index), tokens, names, journal)

        with ThreadPoolExecutor(workers) as threads:
            for _ in threads.map(write, missing):
                bar.update()


def _writer(
    tokens: TokenSource, names: Sequence[str]
) -> Callable[[tuple[Path, list[list[Document]]]], str]:
    def write(task: tuple[Path, list[list[Document]]]) -> str:
        """Return the shard's hash."""
        path, rows = task
        write_shard(path, rows, tokens, names)
        return file_hash(path)

    return write


def write_shard(
    path: Path,
    sequences: Sequence[Sequence[Document]],
    tokens: TokenSource,
    names: Sequence[str],
    journal: Journal | None = None,
) -> None:
    """Write one shard under a temporary name, sync, rename.

    Columns: the documents' tokens joined, their masks joined, where each document starts, and of
    each document the source's index and its row number. The schema's metadata holds the format's
    version and the sources' names. A journal keeps the file's hash.
    """
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for sequence in sequences:
        for document in sequence:
            one, two = tokens.read(document)
            ids.append(one)
            masks.append(two)
    lengths = [sum(document.length for document in sequence) for sequence in sequences]
    documents = [len(sequence) for sequence in sequences]
    starts = [
        np.cumsum([0, *(document.length for document in sequence[:-1])]) for sequence in sequences
    ]
    flat = [document for sequence in sequences for document in sequence]
    schema = SCHEMA.with_metadata({"schema_version": VERSION, "sources": json.dumps(list(names))})
    table = pa.table(
        [
            _lists(_joined(ids, np.int32), lengths),
            _lists(_joined(masks, np.int8), lengths),
            _lists(_joined(starts, np.int32), documents),
            _lists(np.array([document.source for document in flat], dtype=np.int16), documents),
            _lists(np.array([document.number for document in flat], dtype=np.int64), documents),
        ],
        schema=schema,
    )
    place = writing(path) if journal is None else journal.writing(path)
    with (
        place as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        writer.write_table(table)


def _joined(parts: Sequence[np.ndarray], dtype: type[np.integer]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def _lists(values: np.ndarray, lengths: Sequence[int]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
