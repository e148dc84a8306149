"""Strikes a process in the midst of what it writes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR


class Reaper:
    """Counts what changes the run folder, and kills (or stops) this process in the midst of it.

    Args:
        root: The run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = f"{root}{os.sep}"
        self.seen, self.at, self.is_torn = 0, 0, False
        self.signal = signal.SIGKILL
        self.victim: tuple[str, int] | None = None

    def install(self) -> None:
        """Look at every call from here on; there is no way back."""
        sys.addaudithook(self._hook)
        os.fsync = self._fsync  # raises no audit event

    def arm(self, at: int, kind: str) -> None:
        """Strike at the `at`-th change from now, from 1."""
        self.seen, self.at, self.is_torn = 0, at, kind == "torn"
        self.signal = getattr(signal, kind, signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and isinstance(flags, int) and flags & WRITES:
                self._change(os.fspath(path), is_write=True)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            self._change(os.fspath(arguments[1 if event == "os.rename" else 0]))
        elif event == "shutil.rmtree":
            self._change(os.fspath(arguments[0]))

    _plain_fsync = staticmethod(os.fsync)

    def _fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._change(path, is_write=os.path.isfile(path))
        self._plain_fsync(descriptor)

    def _change(self, path: str | bytes, is_write: bool = False) -> None:
        path = os.fsdecode(path)
        # Within `shutil.rmtree` names are relative to a folder's descriptor.
        if os.path.isabs(path) and not path.startswith(self.root):
            return
        self.seen += 1
        if self.victim is not None:
            victim, before = self.victim
            if os.path.isfile(victim):
                size = os.path.getsize(victim)
                os.truncate(victim, before + max(0, size - before) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at and self.seen == self.at:
            if not self.is_torn:
                os.kill(os.getpid(), self.signal)
                return
            name = path if is_write else ""
            self.victim = (name, os.path.getsize(name) if os.path.isfile(name) else 0)
