"""Files that are whole or not there, and folders that know what was written into them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# A line a finished file: its name within the folder, the SHA-256 of its content, and a check of
# both, so that a damaged name is not taken for that of a file that has been lost.
JOURNAL = "written.jsonl"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Hashes that this process has computed, by what changes when a file does. A change right after
# another one may leave all of that as it was, so files that were just written are not kept here.
_HASHES: dict[tuple[str, int, int, int], str] = {}
_SETTLED_NS = 2_000_000_000


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file; a file that did not change is read once a process.

    One core hashes one to two gigabytes a second, where the processor has instructions for it.
    """
    path = Path(path)
    state = path.stat()
    key = (str(path.absolute()), state.st_size, state.st_ctime_ns, state.st_ino)
    if key in _HASHES:
        return _HASHES[key]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - state.st_ctime_ns > _SETTLED_NS:
        _HASHES[key] = found
    return found


def prefix_hash(path: Path, size: int) -> str:
    """Return the SHA-256 of a file's first `size` bytes."""
    with path.open("rb") as file:
        return prefix_of(file, size)


def prefix_of(file: BinaryIO, size: int) -> str:
    """Return the SHA-256 of an open file's next `size` bytes."""
    found = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        found.update(block)
        size -= len(block)
    return found.hexdigest()


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Let errors of the disk within the block name a file.

    Writes through an open file raise errors without its name; safetensors and tokenizers raise
    types of their own that end in "(os error 28)".

    Raises:
        OSError: With number, reason and `path`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name; what was written there is synced and takes its own name at the end.

    When the block fails nothing is left behind: a full disk gets its space back.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk: then it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


class Journal:
    """What the finished files of a folder held, so that one that has changed is made again.

    A file's line is written before the file takes its name, so a file without one was not written
    here. A folder without any journal is of an earlier version: its files are taken as they are.

    Args:
        folder: Where files and journal lie.
    """

    def __init__(self, folder: Path) -> None:
        """Read the journal; a line that cannot be read vouches for nothing."""
        self.folder = folder
        self.path = folder / JOURNAL
        self._is_new = not self.path.is_file()
        self._known: dict[str, str] = {}
        for line in [] if self._is_new else self.path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                name, found = str(row["name"]), str(row["sha256"])
                # Earlier versions wrote no check; no changed bit makes a line of now one of theirs.
                if row.keys() == {"name", "sha256"} or row["check"] == _check(name, found):
                    self._known[name] = found
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def holds(self, path: Path) -> bool:
        """Return whether a file is there as it was written; one that is not so is removed."""
        name = str(path.relative_to(self.folder))
        if not path.is_file():
            if name in self._known:
                print(f"{path}: missing; it is made again", file=sys.stderr)
            return False
        if self._is_new and name not in self._known:
            self.note(path)
        if self._known.get(name) == file_hash(path):
            return True
        print(f"{path}: not what was written; it is made again", file=sys.stderr)
        path.unlink()
        return False

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Do as `writing`, and keep the hash of what was written."""
        with writing(path) as temporary:
            yield temporary
            self._append(str(path.relative_to(self.folder)), file_hash(temporary))

    def note(self, path: Path, name: str = "", found: str = "") -> None:
        """Keep the hash of a file that came from elsewhere.

        Args:
            path: Where it is.
            name: The one that it will have in the folder.
            found: Its hash, where somebody knows it.
        """
        self._append(name or str(path.relative_to(self.folder)), found or file_hash(path))

    def holds_folder(self, path: Path) -> bool:
        """Return whether a folder is there as it was written; one that is not so is removed."""
        if not path.is_dir():
            return False
        prefix = f"{path.relative_to(self.folder)}/"
        names = [name for name in self._known if name.startswith(prefix)]
        if self._is_new or (names and all(self.holds(self.folder / name) for name in names)):
            return True
        shutil.rmtree(path)
        return False

    def changed(self) -> list[Path]:
        """Return the files that are not as they were written, or not there."""
        paths = {self.folder / name: found for name, found in self._known.items()}
        return [p for p, found in paths.items() if not p.is_file() or file_hash(p) != found]

    def _append(self, name: str, found: str) -> None:
        self._known[name] = found
        row = {"name": name, "sha256": found, "check": _check(name, found)}
        line = json.dumps(row, ensure_ascii=False)
        with disk_errors(self.path), self.path.open("ab+") as file:
            # A line that a kill cut off must not run into this one.
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def _check(name: str, found: str) -> str:
    return hashlib.sha256(f"{name}\n{found}".encode()).hexdigest()[:16]
