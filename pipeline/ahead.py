"""Batches ahead of training: generation of the next ones overlaps the current step.

With staleness s, batch k is drawn by the weights that step k − s left behind (by the first ones
while there are none), never by newer or older ones: which weights draw what is fixed, so two runs
are equal, however long generation takes beside training. With s = 0 a batch is drawn by the
weights that it trains, and nothing overlaps.

    s = 1    engine    batch 0 │ batch 1 (weights 0) │ batch 2 (weights 1) │ …
             trainer           │ step 0              │ step 1              │ …

The weights are handed over as copies in main memory, one for each batch that waits for them: on
a GPU each would be a second model beside the one that is trained. One thread asks the engine; with
a server the work is elsewhere, with an engine in this process the thread shares its cores.

A run that was killed goes on exactly: a training state is saved only when the s batches that
follow it are drawn, and those lie beside it as they were drawn, since the weights that drew them
are gone. What is off-policy about them is the correction's matter (`pipeline.correction`).

This is the bounded staleness of AReaL (Fu et al. 2025, arXiv:2505.24298, section 5), with the
bound always met from the s-th step on and no weights changed in the middle of a completion.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from data_prep.jsonl import read_rows, write_rows
from pipeline.batch import Sequence
from pipeline.engines import Engine

# A step's sequences with signal, and figures about how they came about.
Batch = tuple[list[Sequence], dict[str, float]]
Draw = Callable[[int], Batch]
Weights = dict[str, Tensor]


class Ahead:
    """Draws the batches of training steps, `staleness` of them ahead.

    Args:
        draw: Draws a step's batch with the weights that the engine holds.
        engine: Takes the weights.
        staleness: s; 0 draws when asked.
        start: First step of this process.
        total: Steps in all.
        folder: Where batches wait that a saved state will need.
        writes: Whether this process puts them there; of several, one does.
        any_of_us: Whether any of the processes that draw together says yes; asked from the thread.
    """

    def __init__(
        self,
        draw: Draw,
        engine: Engine,
        staleness: int,
        start: int,
        total: int,
        folder: Path,
        writes: bool = True,
        any_of_us: Callable[[bool], bool] = bool,
    ) -> None:
        """Take up the batches that an interrupted run had drawn."""
        self._writes, self._any_of_us = writes, any_of_us
        self._draw, self._engine = draw, engine
        self._staleness, self._total, self._folder = staleness, total, folder
        self._stopped = False
        self._weights: SimpleQueue[tuple[int, Weights] | None] = SimpleQueue()
        self._batches: dict[int, Future[Batch]] = {}
        self._thread: threading.Thread | None = None
        # A thread begins on the first GPU and its default stream. On this one's, what both do is
        # in order, and the engine finds the memory where this thread has made it.
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        if not staleness:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._batches = {step: Future() for step in range(start, total)}
        if start:
            for step in range(start, min(start + staleness, total)):
                self._batches[step].set_result(_read(self._path(step)))
        self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
        self._thread.start()

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand over the weights after `version` steps."""
        if version >= self._total:
            return
        if self._thread is None:
            self._engine.load_weights(weights, version)
        elif any(not self._batches[step].done() for step in self._steps(version)):
            takes = getattr(self._engine, "takes_weights", True)
            copies = {}
            for name, value in weights:  # to the end: a split model is gathered by all ranks
                if takes:
                    copies[name] = value.detach().to("cpu", copy=True)
            self._weights.put((version, copies))

    def draw(self, step: int) -> Batch:
        """Return a step's batch; wait for it where it is not drawn yet."""
        if self._thread is None:
            return self._draw(step)
        batch = self._batches[step].result()
        self._batches.pop(step)
        return batch

    def keep(self, step: int) -> list[Path]:
        """Wait for the batches that a state of `step` steps needs beside it; return their files."""
        if self._thread is None:
            return []
        needed = range(step, min(step + self._staleness, self._total))
        for number in needed:
            self._batches[number].result()
        return [self._path(number) for number in needed]

    def drop(self, step: int) -> None:
        """Remove the batches before `step`, the first one that a saved state still needs."""
        for path in self._folder.glob("batch-*.jsonl") if self._writes else ():
            if int(path.stem.removeprefix("batch-")) < step:
                path.unlink()

    def close(self) -> None:
        """End the thread; a batch that is being drawn is waited for, up to half a minute."""
        if self._thread is not None:
            self._stopped = True
            self._weights.put(None)
            self._thread.join(timeout=30.0)

    def _steps(self, version: int) -> range:
        """Return the steps whose batches these weights draw."""
        first = version + self._staleness if version else 0
        return range(first, min(version + self._staleness + 1, self._total))

    def _work(self) -> None:
        """Draw batches in the order of the weights, until `close`."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # and its GPU
        while (item := self._weights.get()) is not None:
            version, weights = item
            waiting = [step for step in self._steps(version) if not self._batches[step].done()]
            try:
                self._engine.load_weights(weights.items(), version)
                for step in waiting:
                    # All together: one that draws on would wait for the others for ever.
                    if self._any_of_us(self._stopped):
                        raise RuntimeError("no more batches are drawn: a process has stopped")
                    batch = self._draw(step)
                    if self._writes:
                        _write(self._path(step), batch)
                    self._batches[step].set_result(batch)
            except BaseException as error:  # whatever it is belongs to who waits for the batch
                for future in list(self._batches.values()):
                    if not future.done():
                        future.set_exception(error)
                return

    def _path(self, step: int) -> Path:
        return self._folder / f"batch-{step:06d}.jsonl"


def _write(path: Path, batch: Batch) -> None:
    sequences, figures = batch
    write_rows(path, [{"figures": figures}, *({"sequence": asdict(s)} for s in sequences)])


def _read(path: Path) -> Batch:
    rows = [row for _, row in read_rows(path)]
    return [Sequence(**row["sequence"]) for row in rows[1:]], rows[0]["figures"]
