"""Long-lived worker processes that judge streams of answers, each within its limits.

Safe from any thread, from an event loop and in a forked child: there is no
signal, no fork, and no `__main__` guard is needed. A worker that runs over its
wall time or memory is killed and replaced; only the row it was at is lost, with
a verdict that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .checkers import load_checker
from .process import Process, Settings, Stopped, WorkerFailedError
from .verdict import Outcome, Verdict

Row = tuple[str, str]
_CHUNK = 64
_AHEAD = 3


class _Chunk:
    """Rows on their way through a worker."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.verdicts: list[Verdict] = []
        self.error: Exception | None = None
        self.done = threading.Event()
        self.wake: Any = None  # called when done, for event loops

    def finish(self) -> None:
        self.done.set()
        if self.wake is not None:
            self.wake()


class VerifierPool:
    """A pool of worker processes around one checker.

    Args:
        kind: The checker, see `load_checker`.
        options: Its options; JSON values only, since they cross a pipe.
        workers: Number of processes.
        time_limit_s: Wall time for one row, seconds.
        memory_limit_mb: Memory of one process, MiB.
        warm: Load sympy when a worker starts, so that no row pays for it; the
            default does so for the checkers that use it.

    Raises:
        ValueError: A limit that is not positive, or what `load_checker` raises.
    """

    def __init__(
        self,
        kind: str = "boxed",
        options: Mapping[str, Any] | None = None,
        *,
        workers: int = 2,
        time_limit_s: float = 1.0,
        memory_limit_mb: int = 512,
        warm: bool | None = None,
    ) -> None:
        """Check the arguments; processes start with the first row."""
        for name, value in (
            ("workers", workers),
            ("time_limit_s", time_limit_s),
            ("memory_limit_mb", memory_limit_mb),
        ):
            if not value > 0:
                raise ValueError(f"VerifierPool: {name} is {value!r}, expected a positive number")
        load_checker(kind, options)
        if warm is None:
            warm = kind in ("boxed", "steps", "compose", "numeric")
        self._settings = Settings(
            kind, dict(options or {}), float(time_limit_s), int(memory_limit_mb), warm
        )
        self._workers = workers
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes: dict[int, Process] = {}
        self._spares: list[Process] = []
        self._spare_thread: threading.Thread | None = None

    def __enter__(self) -> VerifierPool:
        """Return the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    def start(self) -> None:
        """Start every worker now and wait until all are ready.

        Raises:
            WorkerFailedError: A worker did not come up.
        """
        self.verify_many([("0", "0")] * self._workers, chunk_size=1)

    def close(self) -> None:
        """End every worker. Rows in flight get their verdicts first."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return
        with self._lock:
            threads, spare_thread = list(self._threads), self._spare_thread
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            thread.join()
        if spare_thread is not None:
            spare_thread.join()
        for spare in self._spares:
            spare.kill()

    def terminate(self) -> None:
        """End every worker at once; rows in flight are lost. For the end of the program."""
        self._closed = True
        if os.getpid() == self._pid:
            for process in [*self._processes.values(), *self._spares]:
                process.kill()

    def verify_within(self, gold: str, text: str, seconds: float) -> Verdict | None:
        """Judge one row, waiting no longer than `seconds`; None when that is too short."""
        chunk = _Chunk([(gold, text)])
        self._submit(chunk)
        if not chunk.done.wait(seconds):
            return None
        if chunk.error is not None:
            raise chunk.error
        return chunk.verdicts[0]

    def verify_many(self, rows: Iterable[Row], *, chunk_size: int | None = None) -> list[Verdict]:
        """Judge rows.

        Args:
            rows: `(gold, text)` pairs.
            chunk_size: Rows sent to a worker at once; the default follows from
                their number.

        Returns:
            Their verdicts, in the order of the rows.

        Raises:
            WorkerFailedError: Workers do not come up.
            TypeError: A row is not a pair of strings; the message names it.
        """
        rows = list(rows)
        if chunk_size is None:
            chunk_size = max(1, min(_CHUNK, len(rows) // (4 * self._workers)))
        return list(self.iter_many(rows, chunk_size=chunk_size))

    def iter_many(self, rows: Iterable[Row], *, chunk_size: int = 16) -> Iterator[Verdict]:
        """Judge a stream, a bounded way ahead of what has been taken.

        Args:
            rows: `(gold, text)` pairs; taken as verdicts are taken.
            chunk_size: Rows sent to a worker at once.

        Yields:
            Verdicts in the order of the rows.

        Raises:
            WorkerFailedError: Workers do not come up.
            TypeError: A row is not a pair of strings; the message names it.
        """
        waiting: deque[_Chunk] = deque()
        for chunk in _chunks(rows, chunk_size):
            self._submit(chunk)
            waiting.append(chunk)
            if len(waiting) >= _AHEAD * self._workers:
                yield from _collect(waiting.popleft())
        while waiting:
            yield from _collect(waiting.popleft())

    async def averify_many(self, rows: Iterable[Row]) -> list[Verdict]:
        """Judge rows without blocking the event loop; see `verify_many`."""
        rows = list(rows)
        chunk_size = max(1, min(_CHUNK, len(rows) // (4 * self._workers)))
        return [v async for v in self.aiter_many(rows, chunk_size=chunk_size)]

    async def aiter_many(
        self, rows: Iterable[Row], *, chunk_size: int = 16
    ) -> AsyncIterator[Verdict]:
        """Judge a stream without blocking the event loop; see `iter_many`."""
        loop = asyncio.get_running_loop()
        waiting: deque[tuple[_Chunk, asyncio.Event]] = deque()
        for chunk in _chunks(rows, chunk_size):
            event = asyncio.Event()
            chunk.wake = _waker(loop, event)
            self._submit(chunk)
            waiting.append((chunk, event))
            if len(waiting) >= _AHEAD * self._workers:
                async for verdict in _acollect(*waiting.popleft()):
                    yield verdict
        while waiting:
            async for verdict in _acollect(*waiting.popleft()):
                yield verdict

    def _submit(self, chunk: _Chunk) -> None:
        if os.getpid() != self._pid:
            self._forget_parent()
        if self._closed:
            raise RuntimeError("this VerifierPool is closed; make a new one")
        with self._lock:
            if len(self._threads) < self._workers:
                index = len(self._threads)
                thread = threading.Thread(
                    target=self._run, args=(index,), name=f"verifier-{index}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        self._tasks.put(chunk)

    def _forget_parent(self) -> None:
        """After a fork the threads are gone and the processes belong to the parent."""
        for process in [*self._processes.values(), *self._spares]:
            process.abandon()
        self._reset()

    def _run(self, index: int) -> None:
        tasks, processes = self._tasks, self._processes
        while (chunk := tasks.get()) is not None:
            try:
                while len(chunk.verdicts) < len(chunk.rows):
                    self._advance(index, chunk)
            except Exception as error:  # goes to the thread that waits for the chunk
                chunk.error = error
            chunk.finish()
        process = processes.pop(index, None)
        if process is not None:
            process.kill()

    def _next_process(self) -> Process:
        """Take the spare that a slow row has prepared, or start a process."""
        # A thread is set and started under the lock; one that has not begun cannot be waited for.
        with self._lock:
            thread = self._spare_thread
        if thread is not None:
            thread.join()
        with self._lock:
            while self._spares:
                spare = self._spares.pop()
                if spare.alive:
                    return spare
        return Process(self._settings)

    def _prepare_spare(self) -> None:
        """Start a successor in the background, at most one at a time."""
        with self._lock:
            running = self._spare_thread is not None and self._spare_thread.is_alive()
            if self._spares or running or self._closed:
                return
            self._spare_thread = threading.Thread(target=self._start_spare, daemon=True)
            self._spare_thread.start()

    def _start_spare(self) -> None:
        # A process that does not start is reported when it is needed, not here.
        with contextlib.suppress(WorkerFailedError, OSError):
            self._spares.append(Process(self._settings))

    def _advance(self, index: int, chunk: _Chunk) -> None:
        """Ask for the rest of a chunk; on a lost worker, answer for the row it was at."""
        process = self._processes.get(index)
        if process is None or not process.alive:
            process = self._processes[index] = self._next_process()
        first = len(chunk.verdicts)
        answered: list[Verdict] = []
        stopped = process.ask(chunk.rows[first:], answered, self._prepare_spare)
        chunk.verdicts.extend(answered)
        if stopped is not None:
            del self._processes[index]
            chunk.verdicts.append(_lost(stopped, self._settings))


def _lost(stopped: Stopped, settings: Settings) -> Verdict:
    if stopped.rule == "timeout":
        ms = settings.time_limit_s * 1000.0
        return Verdict(Outcome.TIMEOUT, rule="timeout", ms=ms, detail=stopped.detail)
    return Verdict(Outcome.ERROR, rule=stopped.rule, detail=stopped.detail)


def _chunks(rows: Iterable[Row], size: int) -> Iterator[_Chunk]:
    if size < 1:
        raise ValueError(f"VerifierPool: chunk_size is {size}, expected at least 1")
    stream = iter(rows)
    start = 0
    while part := list(itertools.islice(stream, size)):
        for offset, row in enumerate(part):
            if not _is_row(row):
                raise TypeError(
                    f"row {start + offset}: found {row!r:.80}, "
                    "expected a pair (gold, text) of strings"
                )
        start += len(part)
        yield _Chunk(part)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, Sequence)
        and len(row) == 2
        and isinstance(row[0], str)
        and isinstance(row[1], str)
        and not isinstance(row, str)
    )


def _collect(chunk: _Chunk) -> Iterator[Verdict]:
    chunk.done.wait()
    if chunk.error is not None:
        raise chunk.error
    yield from chunk.verdicts


async def _acollect(chunk: _Chunk, event: asyncio.Event) -> AsyncIterator[Verdict]:
    await event.wait()
    if chunk.error is not None:
        raise chunk.error
    for verdict in chunk.verdicts:
        yield verdict


def _waker(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Any:
    def wake() -> None:
        # The loop may be closed by the time a cancelled caller's rows are done.
        if not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    return wake


def verify_many(
    rows: Iterable[Row],
    *,
    workers: int = 2,
    policy: str = "boxed",
    time_limit_s: float = 1.0,
    memory_limit_mb: int = 512,
) -> list[Verdict]:
    """Judge rows in worker processes that end with the call.

    Args:
        rows: `(gold, text)` pairs.
        workers: Number of processes.
        policy: How answers are found.
        time_limit_s: Wall time for one row, seconds.
        memory_limit_mb: Memory of one process, MiB.

    Returns:
        Their verdicts, in the order of the rows.
    """
    with VerifierPool(
        "boxed",
        {"policy": policy},
        workers=workers,
        time_limit_s=time_limit_s,
        memory_limit_mb=memory_limit_mb,
    ) as pool:
        return pool.verify_many(rows)


async def averify_many(
    rows: Iterable[Row],
    *,
    workers: int = 2,
    policy: str = "boxed",
    time_limit_s: float = 1.0,
    memory_limit_mb: int = 512,
) -> list[Verdict]:
    """Judge rows without blocking the event loop; see `verify_many`."""
    pool = VerifierPool(
        "boxed",
        {"policy": policy},
        workers=workers,
        time_limit_s=time_limit_s,
        memory_limit_mb=memory_limit_mb,
    )
    try:
        return await pool.averify_many(rows)
    finally:
        # Closing waits for the processes to end, which the loop should not.
        await asyncio.to_thread(pool.close)


__all__ = ["VerifierPool", "WorkerFailedError", "averify_many", "verify_many"]
