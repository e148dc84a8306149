"""Where sampled shards live: once drawn they are never changed and never thrown away.

`<out>/samples/<checkpoint>/<suite>-<key>` holds the shards of one suite and `generation.json`,
everything that decided them; the key is that file's fingerprint. Evaluations hold links to the
shards. So another K, checker, reward model, profile or suite never costs a sample, a change that
does decide samples starts a log of its own, and changing back finds the first one.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from data_prep.config import fingerprint
from data_prep.errors import UserError
from data_prep.files import file_hash, writing
from data_prep.jsonl import read_json, write_json


def log_folder(out: Path, checkpoint: str, suite: str, generation: dict[str, Any]) -> Path:
    """Return the folder of a log, made where it is not there.

    Args:
        out: Folder of the results.
        checkpoint: What figures call the checkpoint.
        suite: The suite's name.
        generation: Everything that decides the samples.
    """
    folder = out / "samples" / checkpoint / f"{suite}-{fingerprint(generation)}"
    path = folder / "generation.json"
    if folder.is_dir():
        if _holds(path, generation):
            return folder
        print(f"{path}: missing or damaged; it is made again", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, generation)
    return folder


def _holds(path: Path, value: dict[str, Any]) -> bool:
    try:
        return fingerprint(read_json(path)) == fingerprint(value)  # JSON has no tuples
    except UserError:
        return False


def restore(log: Path, evaluation: Path) -> None:
    """Give a log the shards back that it has lost and a complete evaluation still holds.

    Args:
        log: The suite's log.
        evaluation: The suite's folder in an evaluation that was found to be as it was written.
    """
    for path in sorted(evaluation.glob("*-[0-9][0-9][0-9][0-9][0-9].jsonl")):
        shard = log / path.name
        if not shard.is_file():
            print(f"{shard}: missing; taken from {path}", file=sys.stderr)
        elif not shard.samefile(path) and file_hash(shard) != file_hash(path):
            print(f"{shard}: not what was written; taken from {path}", file=sys.stderr)
        else:
            continue
        link(path, shard)


def log_shards(folder: Path, label: str) -> list[Path]:
    """Return the shards of a suite's log, in order.

    Args:
        folder: The suite's folder in an evaluation, or the log's own.
        label: "samples" or "greedy"; an evaluation with n = 0 has its greedy samples as both.
    """
    shards = sorted(folder.glob(f"{label}-*.jsonl"))
    return shards or sorted(folder.glob("greedy-*.jsonl"))


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; on a file system without links, copy it.

    Another file of that name gives way: it is of a shard that had to be drawn again.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        if not Path(source).samefile(target):
            Path(target).unlink()
            link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        with writing(target) as temporary:
            shutil.copy2(source, temporary)


def link_folder(source: Path, target: Path) -> None:
    """Take a folder over whole, its files by link."""
    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
