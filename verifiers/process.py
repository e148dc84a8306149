"""One worker process, as the pool sees it: start, ask, kill."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .worker import unpack

_START_S = 60.0
_POLL_S = 0.05
_SLOW = 0.15
_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); import importlib; "
    "importlib.import_module(sys.argv[2] + '.worker').main()"
)


class WorkerFailedError(RuntimeError):
    """A worker process could not be started."""


class Settings(NamedTuple):
    """What a worker needs to know.

    Attributes:
        kind: The checker.
        options: Its options; plain JSON values.
        time_limit_s: Wall time of one row, seconds.
        memory_limit_mb: Address space of the process, MiB.
        warm: Whether to load sympy before the first row.
    """

    kind: str
    options: dict[str, Any]
    time_limit_s: float
    memory_limit_mb: int
    warm: bool


class Stopped(NamedTuple):
    """Why a worker gave no further verdict: `timeout`, `memory_limit` or `worker_died`."""

    rule: str
    detail: str


class Process:
    """A running worker. Used by one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        """Start the process and wait until it is ready.

        Raises:
            WorkerFailedError: It did not come up.
        """
        package = __name__.rsplit(".", 1)[0]
        root = str(Path(__file__).resolve().parent.parent)
        self._settings = settings
        self._child = subprocess.Popen(  # noqa: S603 -- our own interpreter and our own code
            [sys.executable, "-c", _CODE, root, package],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self._buffer = bytearray()
        self.pid = self._child.pid
        self._write(settings._asdict())
        first = self._read(time.monotonic() + _START_S)
        if first != "ready":
            self.kill()
            reason = first["failed"] if isinstance(first, dict) else str(first)
            raise WorkerFailedError(
                f"verifier worker for kind {settings.kind!r} did not start: {reason}; "
                f"memory_limit_mb is {settings.memory_limit_mb}, raise it if the checker needs more"
            )

    def ask(
        self, rows: list[tuple[str, str]], answered: list[Any], on_slow: Callable[[], None]
    ) -> Stopped | None:
        """Judge rows.

        Args:
            rows: `(gold, text)` pairs.
            answered: Verdicts are appended here, in order, as they come.
            on_slow: Called when a row has taken a good part of its limit, so that a
                successor is ready by the time this process is killed.

        Returns:
            None when every row asked has its verdict, or the worker ended itself after
            the last one in `answered`; else why the worker, now killed, stopped at row
            `len(answered)`.
        """
        limit = self._settings.time_limit_s
        # A verdict is promised within the limit, so the kill comes a little before.
        allowed = limit - min(0.05, 0.05 * limit)
        try:
            self._write(rows)
            while len(answered) < len(rows):
                now = time.monotonic()
                reply = self._read(now + allowed, now + _SLOW * limit, on_slow)
                if isinstance(reply, Stopped):
                    self.kill()
                    return reply
                answered.extend(map(unpack, reply))
                if answered[-1].rule == "memory_limit":
                    self.kill()  # it ends itself; the rest goes to its successor
                    return None
        except (BrokenPipeError, ValueError) as error:
            self.kill()
            return Stopped("worker_died", f"{type(error).__name__}: {error}")
        return None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child.poll() is None

    def kill(self) -> None:
        """End the process at once; harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._child.wait()

    def abandon(self) -> None:
        """Close our ends of the pipes after a fork: the process is the parent's."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._child.returncode = 0  # keeps Popen from waiting for another's child

    def _write(self, value: Any) -> None:
        data = memoryview(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        stdin = self._child.stdin
        if stdin is None or stdin.closed:
            raise BrokenPipeError("the worker has ended")
        while data:
            written = stdin.write(data)
            data = data[written or 0 :]

    def _read(
        self,
        deadline: float,
        slow_at: float = float("inf"),
        on_slow: Callable[[], None] | None = None,
    ) -> Any:
        stdout = self._child.stdout
        if stdout is None:
            raise BrokenPipeError("the worker has no output")
        poll = select.poll()
        poll.register(stdout.fileno(), select.POLLIN | select.POLLHUP)
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                return json.loads(line)
            left = deadline - time.monotonic()
            if left <= 0:
                return Stopped("timeout", f"no verdict within {self._settings.time_limit_s} s")
            if not poll.poll(min(left, _POLL_S) * 1000):
                if on_slow is not None and time.monotonic() > slow_at:
                    on_slow()
                    on_slow = None
                if self._too_large():
                    return Stopped("memory_limit", f"over {self._settings.memory_limit_mb} MiB")
                continue
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                return Stopped("worker_died", f"the worker ended with code {self._child.wait()}")
            self._buffer += data

    def _too_large(self) -> bool:
        """Whether the resident memory is over the limit, where the system tells."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return False
        return pages * os.sysconf("SC_PAGE_SIZE") > self._settings.memory_limit_mb << 20
