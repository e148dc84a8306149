"""A run folder: one sub-folder a stage, complete or not there.

A stage works in `<name>.partial` and is renamed to `<name>` when complete, with a manifest
that holds the hash of its configuration and inputs and the hash of every file it made. A
stage whose plan equals the manifest's is skipped; a partial folder of the same plan is gone
on with; one of another plan is dropped, since its rows belong to another configuration. What a
machine is has no part in a plan: a run may move. Where a stage goes on on another kind of
processor, whose sums round otherwise, that is said, and its manifest names both.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from . import jsonl
from .config import Config, fingerprint
from .errors import UserError
from .files import JOURNAL, Journal, disk_errors, file_hash, sync
from .manifest import (
    BESIDE,
    FORMAT,
    check_stage,
    content,
    input_hash,
    read_manifest,
    read_sealed,
    sealed,
)
from .versions import processor, versions

SCHEMA = 1
# Longest wait for another process that gives a complete stage its name.
RENAME_S = 5.0
# Characters of a value, such as a hash, that a message about two plans shows.
LONGEST_SHOWN = 80
# One component of a path, and no way out of the folder that it stands in.
FOLDER_NAME = r"^\w[\w.+ -]*$"


def folder_name(name: object, where: str) -> str:
    """Return a name that may be joined to a folder's path.

    Args:
        name: From a configuration, a command line or a file.
        where: Names the place in errors.

    Raises:
        UserError: It is a path, or has characters that no name of ours has.
    """
    if not isinstance(name, str) or re.fullmatch(FOLDER_NAME, name) is None:
        raise UserError(
            where,
            f"{name!r:.80} as the name of a folder",
            "letters, digits, '_', '.', '+', '-', and no '/'",
            "mend the name",
        )
    return name


def _path_plugins(value: Any) -> dict[str, Path]:
    """Return the files of all plug-ins that a configuration names by path."""
    found: dict[str, Path] = {}
    if isinstance(value, Mapping):
        kind = value.get("kind")
        if isinstance(kind, str) and kind.endswith(".py"):
            found[f"plugin {kind}"] = Path(kind)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            found |= _path_plugins(inner)
    return found


# Locks that this process holds, by lock file: a stage may be entered again after an error.
_LOCKS: dict[Path, IO[bytes]] = {}


def _lock(path: Path, wait_s: float = 0.0) -> bool:
    """Take a stage's lock, unless this process holds it; return whether it was taken.

    The kernel gives it back when the process ends, however it ends, so no lock is ever stale.

    Args:
        path: Of the lock.
        wait_s: Longest wait for another process to give it back.

    Raises:
        UserError: Another process holds it.
    """
    until = time.monotonic() + wait_s
    path = path.resolve()
    if path in _LOCKS:
        return False
    with ExitStack() as failing:
        # Unbuffered: what a full disk refused must not be tried again where it is closed.
        file = failing.enter_context(path.open("ab+", buffering=0))
        while not _flock(file):
            if time.monotonic() < until:
                time.sleep(0.02)
                continue
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            raise UserError(
                str(path.parent),
                f"this stage is running in process {holder}",
                "one process a stage",
                "wait for it, or stop it",
            )
        with disk_errors(path):
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        failing.pop_all()
    _LOCKS[path] = file
    return True


def _flock(file: IO[bytes]) -> bool:
    """Return whether a file could be locked at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(path: Path) -> None:
    """Give a stage's lock back, where this process holds it."""
    file = _LOCKS.pop(path.resolve(), None)
    if file is not None:
        # Closing alone would leave it to a worker process that was forked meanwhile.
        fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


class Stage:
    """One stage's folder, from plan to manifest.

        stage = Stage(run, name, config, inputs)
        if stage.is_complete:
            return stage.final
        with stage:
            work = stage.begin()
            …
            return stage.complete()

    Between `begin` and `complete` no other process touches it; leaving the block without
    `complete` keeps what was made, to go on from, and lets another process begin.

    Args:
        run: The run folder.
        name: The stage's name, and its folder's.
        config: What decides the result, together with the inputs.
        inputs: Name to path of every file or stage folder that is read.
    """

    def __init__(
        self,
        run: str | Path,
        name: str,
        config: Config | Mapping[str, Any],
        inputs: Mapping[str, str | Path],
    ) -> None:
        """Compute the plan: what this stage would be made from."""
        self.run, self.name = Path(run), name
        self.final = self.run / name
        self.work = self.run / f"{name}.partial"
        resolved = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
        self.plan = {
            "schema": SCHEMA,
            "stage": name,
            "config": resolved,
            "inputs": {
                key: input_hash(path)
                for key, path in sorted({**inputs, **_path_plugins(resolved)}.items())
            },
        }
        self._started = time.monotonic()
        self._processors = [processor()]

    def __enter__(self) -> Stage:
        """Do nothing: `begin` locks."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back."""
        self.release()

    def release(self) -> None:
        """Give the lock back, where this process holds it."""
        _unlock(self._lock_file)

    @property
    def _lock_file(self) -> Path:
        return self.run / f".{self.name}.lock"

    @property
    def is_complete(self) -> bool:
        """Whether the folder is there and was made from this very plan.

        Raises:
            UserError: It was, and is damaged; or another process is completing it.
        """
        self._finish_rename()
        if not (self.final / "manifest.json").is_file() and self.final.is_dir():
            print(f"{self.final}: no manifest.json; the stage is made again", file=sys.stderr)
        if not self._has_plan(self.final):
            return False
        check_stage(self.final)
        return True

    def _has_plan(self, folder: Path) -> bool:
        """Whether a folder has a manifest, and that is of this very plan."""
        is_there = (folder / "manifest.json").is_file()
        return is_there and bool(read_manifest(folder)["plan"] == self.plan)

    @property
    def is_sound(self) -> bool:
        """Whether the folder is there as it was written, whatever plan it was made from."""
        try:
            check_stage(self.final)
        except UserError:
            return False
        return True

    def begin(self) -> Path:
        """Lock the stage; return the partial folder of the same plan, or an empty one.

        Raises:
            UserError: Another process runs this stage, or has completed it since `is_complete` said
                no; or the partial folder's plan is damaged.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        taken = _lock(self._lock_file)
        if taken and not self.work.is_dir() and self._has_plan(self.final):
            # Loading a model takes its time; others may be reading what was made meanwhile.
            self.release()
            raise UserError(
                str(self.final),
                "another process has just completed this stage",
                "one process a stage",
                "run the same command again: it goes on with the next stage",
            )
        if not self.work.is_dir() and (self.final / "manifest.json").is_file():
            before = read_manifest(self.final)["plan"]
            if before != self.plan:
                print(
                    f"{self.final}: made with {_differences(before, self.plan)}; it is made again",
                    file=sys.stderr,
                )
        plan_file = self.work / "plan.json"
        if self.work.is_dir() and not self._is_gone_on_with(plan_file):
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        for left in sorted(self.work.rglob("*.tmp"), reverse=True):
            # What a kill left half-written; inner ones come first.
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._note_processor(plan_file)
        noted = {"format": FORMAT, "plan": self.plan, "processors": self._processors}
        jsonl.write_json(plan_file, sealed(noted))
        return self.work

    def _note_processor(self, plan_file: Path) -> None:
        """Take over on what a partial folder was made, and say so where this is another kind."""
        if not plan_file.is_file():
            return
        before = read_sealed(plan_file, self._mend).get("processors", [])
        if before and processor() not in before:
            print(
                f"{self.work}: begun on {', '.join(before)}, and goes on on {processor()}: what is "
                "sampled or trained from here on may differ in its last bits",
                file=sys.stderr,
            )
        self._processors = list(dict.fromkeys([*before, processor()]))

    def drop_if_empty(self) -> None:
        """Remove the partial folder where nothing but its plan was written."""
        files = [path for path in self.work.rglob("*") if path.is_file()]
        if files == [self.work / "plan.json"]:
            shutil.rmtree(self.work)

    @property
    def _mend(self) -> str:
        return f"remove {self.work} to start the stage again"

    def _is_gone_on_with(self, plan_file: Path) -> bool:
        if not plan_file.is_file():
            if any(self.work.iterdir()):
                print(f"{self.work}: no plan.json; the stage begins again", file=sys.stderr)
            return False
        found = read_sealed(plan_file, self._mend)
        before = found.get("plan", found)
        if before == self.plan:
            return True
        print(
            f"{self.work}: begun with {_differences(before, self.plan)}; the stage begins again",
            file=sys.stderr,
        )
        return False

    def complete(self, scratch: tuple[str, ...] = (), **counts: Any) -> Path:
        """Write the manifest and give the folder its final name; return it.

        Args:
            scratch: Sub-folders that only served to go on after an interruption; removed.
            **counts: Row counts and other figures to keep in the manifest.

        Raises:
            UserError: A file is no longer what was written.
        """
        for path in Journal(self.work).changed():
            raise UserError(
                str(path),
                "damaged since it was written",
                "what the stage wrote",
                "run the same command: it is made again",
            )
        outputs = content(self.work, scratch)
        for path in self.work.rglob("*"):
            if path.is_dir() or str(path.relative_to(self.work)) in outputs:
                sync(path)
        manifest = {
            "format": FORMAT,
            "plan": self.plan,
            "result": fingerprint(outputs),
            "outputs": outputs,
            # No part of the result, and damaged as easily.
            "beside": {
                str(path.relative_to(self.work)): file_hash(path)
                for path in sorted(self.work.rglob("*"))
                if path.name in BESIDE and path.is_file()
            },
            "scratch": list(scratch),
            "counts": counts,
            "seconds": round(time.monotonic() - self._started, 3),
            "versions": {**versions(), "processor": ", ".join(self._processors)},
        }
        # From here on the stage is complete: a kill leaves only `_rename` to be done.
        jsonl.write_json(self.work / "manifest.json", sealed(manifest))
        (self.work / "plan.json").unlink()
        self._rename(scratch)
        self.release()
        return self.final

    def _rename(self, scratch: tuple[str, ...]) -> None:
        for name in scratch:
            shutil.rmtree(self.work / folder_name(name, "scratch folder"), ignore_errors=True)
        (self.work / JOURNAL).unlink(missing_ok=True)
        old = self.run / f"{self.name}.old"
        _remove(old)
        if self.final.exists():
            self.final.rename(old)
        self.work.rename(self.final)
        sync(self.run)
        _remove(old)

    @property
    def _wants_rename(self) -> bool:
        """Whether it was made, and killed between its manifest and the rename."""
        return (self.work / "manifest.json").is_file() and not (self.work / "plan.json").exists()

    def _finish_rename(self) -> None:
        """Complete a stage that was killed between its manifest and the rename.

        Raises:
            UserError: A process that lives is about to do so, and takes long.
        """
        if not self._wants_rename:
            return
        # Whoever holds it gives the stage its name, as this would, and is done in a moment.
        taken = _lock(self._lock_file, RENAME_S)
        try:
            # Another process may have done it before the lock was had.
            if self._wants_rename and self._has_plan(self.work):
                # It may come from anywhere: what it names is checked before it is removed.
                where = str(self.work / "manifest.json")
                scratch = read_manifest(self.work)["scratch"]
                self._rename(tuple(folder_name(name, where) for name in scratch))
        finally:
            if taken:
                self.release()


def _differences(before: Any, now: Any, most: int = 3) -> str:
    """Return in what two plans differ, by dotted keys and places in lists."""

    def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            inner = value.items()
        elif isinstance(value, list | tuple):
            inner = enumerate(value)
        else:
            yield key, value
        for name, one in inner:
            yield from leaves(one, f"{key}.{name}" if key else str(name))

    old, new = dict(leaves(before, "")), dict(leaves(now, ""))
    keys = [key for key in {**old, **new} if old.get(key, ...) != new.get(key, ...)]

    def shown(values: dict[str, Any], key: str) -> str:
        text = repr(values[key]) if key in values else "nothing"
        return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"

    said = []
    for key in keys[:most]:
        first, second = shown(old, key), shown(new, key)
        same = first == second
        said.append(f"another {key}" if same else f"{key} = {first}, now {second}")
    if len(keys) > most:
        said.append(f"{len(keys) - most} more")
    return "; ".join(said)


def _remove(folder: Path) -> None:
    """Remove a stage's folder, or the link to one that was moved elsewhere."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
