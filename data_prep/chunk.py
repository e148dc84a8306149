"""One chunk of raw rows to tokens and keys: the work of a mixture that runs in parallel.

A chunk's files depend on the configuration and its own rows only, so that any number of workers
makes the same bytes. Tokens go to flat files that are later read at random; what the selection
looks at goes to a small Arrow file beside them. The `.json` file is written last: it is there if
and only if the chunk is whole.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_prep import near
from data_prep.decontaminate import Index
from data_prep.errors import UserError
from data_prep.files import disk_errors, file_hash
from data_prep.formatting import Formatter, Message, Row
from data_prep.jsonl import write_json
from data_prep.manifest import FORMAT, read_sealed, sealed
from data_prep.mixture_config import MixtureConfig
from data_prep.normalise import normalise
from data_prep.plugins import load_plugin
from data_prep.reading import Rejected, Stretch, convert, read_stretch
from data_prep.rows import messages_of
from data_prep.schema import Chat, Item, Problem

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("rank", pa.uint64()),
        ("text_key", pa.uint64()),
        ("question_key", pa.uint64()),
        ("group_key", pa.uint64()),
        ("numbers_key", pa.uint64()),
        ("length", pa.int32()),
        ("assistant", pa.int32()),
        ("is_flagged", pa.bool_()),
        ("signature", pa.list_(pa.uint32(), near.PERMUTATIONS)),
    ]
)


class Task(NamedTuple):
    """What one worker does at a time.

    Attributes:
        name: Stem of the chunk's files.
        stretch: The raw rows.
        limit: Rows whose rank is at or above it are not in the pool; 2**64 takes all.
        folder: Where the files go.
    """

    name: str
    stretch: Stretch
    limit: int
    folder: Path


class Candidate(NamedTuple):
    """A converted row on its way to tokens."""

    number: int
    rank: int
    messages: list[Message]
    group: str
    is_flagged: bool


@dataclass
class Converter:
    """What a worker holds from chunk to chunk.

    Attributes:
        config: The mixture's.
        seed: Decides ranks.
        formatter: Renders and encodes.
        index: Finds evaluation questions; None without suites.
    """

    config: MixtureConfig
    seed: int
    formatter: Formatter
    index: Index | None

    def run(self, task: Task) -> None:
        """Convert a chunk, unless its files are whole already.

        Raises:
            UserError: A row is bad and its policy is "fail".
        """
        if is_whole(task):
            return
        reasons: Counter[str] = Counter()
        findings: list[dict[str, Any]] = []
        candidates = self._candidates(task, reasons, findings)
        kept, rows = self._tokenise(candidates, reasons)
        self._write(task, kept, rows)
        report = {
            "format": FORMAT,
            "rows": len(kept),
            "reasons": dict(sorted(reasons.items())),
            "findings": findings,
            "files": {path.name: file_hash(path) for path in _files_of(task)},
        }
        write_json(task.folder / f"{task.name}.json", sealed(report))

    def _candidates(
        self, task: Task, reasons: Counter[str], findings: list[dict[str, Any]]
    ) -> list[Candidate]:
        policies = {"bad_row": self.config.on_bad_row, "bad_gold": self.config.on_bad_gold}
        module = load_plugin("data_prep.sources", task.stretch.kind)
        candidates = []
        for place, raw in read_stretch(task.stretch):
            rank = near.key(f"{self.seed}/{place.source}/{place.number}")
            if rank >= task.limit:
                reasons["not_in_pool"] += 1
                continue
            item = convert(module, place, raw)
            if isinstance(item, Rejected):
                if item.error is not None and policies[item.reason] == "fail":
                    raise item.error
                reasons[item.reason] += 1
                if item.error is not None:
                    findings.append(
                        {
                            "reason": item.reason,
                            "where": item.error.where,
                            "found": item.error.found,
                        }
                    )
                continue
            messages, group = conversation_of(item)
            leak = self._leak(messages, str(place), findings)
            if leak == "leaked" or (leak == "flagged" and self.config.on_flagged == "remove"):
                reasons[leak] += 1
                continue
            candidates.append(Candidate(place.number, rank, messages, group, leak == "flagged"))
        return candidates

    def _leak(self, messages: Sequence[Message], where: str, findings: list[dict[str, Any]]) -> str:
        """Return "leaked", "flagged", or nothing."""
        if self.index is None:
            return ""
        for message in messages:
            if message["role"] != "user":
                continue
            leak = self.index.find(message["content"])
            if leak is not None:
                reason = "leaked" if leak.is_exact else "flagged"
                findings.append(
                    {
                        "reason": reason,
                        "where": where,
                        "text": message["content"][:400],
                        "suite": leak.question.suite,
                        "suite_where": leak.question.where,
                        "suite_text": leak.question.text[:400],
                    }
                )
                return reason
        return ""

    def _tokenise(
        self, candidates: Sequence[Candidate], reasons: Counter[str]
    ) -> tuple[list[Candidate], list[Row]]:
        """Encode, and apply the policy for rows that are too long."""
        limit = self.config.max_length
        kept, rows = [], []
        encoded = self.formatter.conversations([c.messages for c in candidates])
        for candidate, row in zip(candidates, encoded, strict=True):
            while len(row[0]) > limit and self._can_shorten(candidate):
                candidate = candidate._replace(messages=_without_last_turn(candidate.messages))
                row = self.formatter.conversation(candidate.messages)
                if len(row[0]) <= limit:
                    reasons["shortened (kept)"] += 1
            if len(row[0]) > limit:
                reasons["too_long"] += 1
                continue
            kept.append(candidate)
            rows.append(row)
        return kept, rows

    def _can_shorten(self, candidate: Candidate) -> bool:
        if self.config.on_too_long != "shorten":
            return False
        turns = [message["role"] for message in candidate.messages]
        # Two answers at least: one has to stay, and a problem has only the one with the box.
        return turns.count("assistant") > 1

    def _write(self, task: Task, kept: Sequence[Candidate], rows: Sequence[Row]) -> None:
        normals = [
            normalise("\n".join(m["content"] for m in candidate.messages)) for candidate in kept
        ]
        questions = [_question(candidate.messages) for candidate in kept]
        question_keys = [near.key(normalise(question)) for question in questions]
        group_keys = [
            near.key(normalise(candidate.group)) if candidate.group else question_key
            for candidate, question_key in zip(kept, question_keys, strict=True)
        ]
        signature = (
            near.signatures(normals)
            if self.config.near_duplicates
            else np.zeros((len(kept), near.PERMUTATIONS), dtype=np.uint32)
        )
        table = pa.table(
            [
                pa.array([c.number for c in kept], pa.int64()),
                pa.array([c.rank for c in kept], pa.uint64()),
                pa.array([near.key(normal) for normal in normals], pa.uint64()),
                pa.array(question_keys, pa.uint64()),
                pa.array(group_keys, pa.uint64()),
                pa.array([near.numbers_key(normal) for normal in normals], pa.uint64()),
                pa.array([len(ids) for ids, _ in rows], pa.int32()),
                pa.array([sum(mask) for _, mask in rows], pa.int32()),
                pa.array([c.is_flagged for c in kept], pa.bool_()),
                pa.FixedSizeListArray.from_arrays(
                    pa.array(signature.reshape(-1)), near.PERMUTATIONS
                ),
            ],
            schema=SCHEMA,
        )
        base = task.folder / task.name
        _flat(base.with_suffix(".ids"), [ids for ids, _ in rows], np.dtype(np.int32))
        _flat(base.with_suffix(".mask"), [mask for _, mask in rows], np.dtype(np.int8))
        with (
            disk_errors(base.with_suffix(".arrow")),
            pa.OSFile(str(base.with_suffix(".arrow")), "wb") as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
        ):
            writer.write_table(table)


def _files_of(task: Task) -> list[Path]:
    return [task.folder / f"{task.name}{suffix}" for suffix in (".ids", ".mask", ".arrow")]


def is_whole(task: Task) -> bool:
    """Return whether a chunk was converted and its files are as they were written."""
    note = task.folder / f"{task.name}.json"
    if not note.is_file():
        return False
    try:
        files = read_report(task)["files"]
        damaged = [p for p in _files_of(task) if not p.is_file() or file_hash(p) != files[p.name]]
    except (UserError, KeyError):
        damaged = [note]
    if damaged:
        print(f"{damaged[0]}: not what was written; it is made again", file=sys.stderr)
    return not damaged


def read_report(task: Task) -> dict[str, Any]:
    """Return what a chunk left out and found, with its number of rows and its files' hashes.

    Raises:
        UserError: The chunk's report is missing or damaged.
    """
    return read_sealed(task.folder / f"{task.name}.json", "run the same command")


def conversation_of(item: Item) -> tuple[list[Message], str]:
    """Return (messages, the problem that it is a rewrite of) of an item to train on.

    Raises:
        UserError: The item is not for supervised training.
    """
    if isinstance(item, Problem) and item.solutions:
        return messages_of(item.question, next(iter(item.solutions.values()))), item.group
    if isinstance(item, Chat):
        return [{"role": role, "content": text} for role, text in item.messages], ""
    raise UserError(
        item.where,
        f"a {type(item).__name__} row without a solution",
        "problems with solutions, or conversations",
        "leave this source out of the mixture",
    )


def _question(messages: Sequence[Message]) -> str:
    return next((m["content"] for m in messages if m["role"] == "user"), "")


def _without_last_turn(messages: Sequence[Message]) -> list[Message]:
    """Take the last answer off, and what led up to it, so that the one before ends the row."""
    shorter = list(messages[:-1])
    while shorter and shorter[-1]["role"] != "assistant":
        shorter.pop()
    return shorter


def _flat(path: Path, rows: Sequence[Sequence[int]], dtype: np.dtype[Any]) -> None:
    total = sum(map(len, rows))
    values = np.fromiter(chain.from_iterable(rows), dtype=dtype, count=total)
    with disk_errors(path), path.open("wb") as file:
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())
