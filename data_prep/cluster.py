"""Work in pieces on the workers of a Ray cluster: many machines, or processes of this one.

    [cluster]
    workers = 64          # in all
    gpus = 1.0            # of each
    address = "auto"      # a cluster that is running; empty starts Ray on this machine

A piece's result depends on the piece alone, so neither the number of workers nor who does what
shows in the files: the process that asks writes them, piece by piece, and a killed run goes on
with the pieces that are missing. A worker that dies is replaced and its piece is done again by
another, a few times; a piece that kills every worker ends the run with its number.

Other machines join with `ray start --address HEAD:6379`, in a checkout of the same commit with
PYTHONPATH set to it, and see the run folder under the same path (a shared file system). A cluster
that starts machines by itself (Ray's autoscaler) does so for workers that wait for a place: with
`wait_s` a stage waits for them.

Ray is an optional extra: pip install -e '.[ray]'.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import Field, model_validator

from data_prep.config import Config
from data_prep.errors import UserError
from data_prep.interruption import check_all

Task = TypeVar("Task")
Found = TypeVar("Found")

# Pieces that wait at a worker, so that it never waits for the next one.
AHEAD = 2
# Times that a piece is given to another worker after one died with it.
RETRIES = 3
# Clusters of this process that are open; they share one connection.
_open: set[object] = set()


class ClusterConfig(Config):
    """Ray workers for sampling, judging, evaluation and the mixture.

    Attributes:
        workers: How many, in all.
        cpus: Cores of each.
        gpus: GPUs of each; a share lets several have one.
        address: Of a cluster that is running ("auto" for the one this machine belongs to); empty
            starts Ray on this machine and ends it with the stage.
        wait_s: Longest wait for machines that a cluster starts by itself, or that are to join,
            where it has no room for the workers; 0 refuses at once. Ray on this machine alone
            gets no more.
    """

    workers: int = Field(default=2, ge=1)
    cpus: float = Field(default=1.0, gt=0.0)
    gpus: float = Field(default=0.0, ge=0.0)
    address: str = ""
    wait_s: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="after")
    def _waits_for_a_cluster(self) -> ClusterConfig:
        if self.wait_s > 0.0 and self.address in ("", "local"):
            raise ValueError(
                f"wait_s is {self.wait_s:g} and address {self.address!r}: Ray is then this "
                "machine's own and no other joins it; give the cluster's address "
                "('auto' for the one that this machine belongs to), or leave wait_s out"
            )
        return self


class Cluster(Generic[Task, Found]):
    """Workers that hold what a piece needs, such as a model, from piece to piece.

        with Cluster(config, make) as cluster:
            for index, found in cluster.map(tasks):
                …

    Args:
        config: How many workers, and where.
        make: Called in each worker before its first piece; returns what is called with each.
        reserves: Whether its workers take cores and GPUs of the cluster for themselves; judges
            work beside those that sample.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self,
        config: ClusterConfig,
        make: Callable[[], Callable[[Task], Found]],
        reserves: bool = True,
    ) -> None:
        """Start or reach Ray; workers start with the first piece."""
        self.config, self.make, self.reserves = config, make, reserves
        self._ray = import_ray()
        self._workers: list[Any] = []
        self._leave: Callable[[], None] = lambda: None

    def __enter__(self) -> Cluster[Task, Found]:
        """Connect."""
        self._leave = connect(self.config)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the workers."""
        self.close()

    def close(self) -> None:
        """End the workers, and leave Ray when nobody here uses it any more."""
        self._end()
        self._leave()

    def _end(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers.clear()

    def _start(self) -> None:
        config, own = self.config, float(self.reserves)
        remote = self._ray.remote(
            num_cpus=own * config.cpus,
            num_gpus=own * config.gpus,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=RETRIES,
        )(_Worker)

        def start() -> None:
            self._workers = [remote.remote(self.make) for _ in range(config.workers)]

        if not self.reserves:
            start()
            return
        try:
            start_with_room(self._ray, config, config.gpus, start)
        except BaseException:
            self._end()
            raise

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Found]]:
        """Yield (number of the piece, what was found), as they are done.

        Args:
            tasks: The pieces.

        Raises:
            UserError: A piece was bad input, or killed every worker that it was given to, or the
                cluster is too small for the workers.
        """
        ray = self._ray
        if not self._workers:
            self._start()
        waiting = enumerate(tasks)
        running: dict[Any, tuple[int, Any]] = {}
        idle = deque(self._workers * AHEAD)
        while True:
            # A piece is made when a worker is free for it: all of them may not fit in memory.
            while idle and (piece := next(waiting, None)) is not None:
                index, task = piece
                worker = idle.popleft()
                running[worker.run.remote(task)] = (index, worker)
            if not running:
                return
            (done, *_), _ = ray.wait(list(running))
            index, worker = running.pop(done)
            idle.append(worker)
            yield index, self._result(done, index)

    def _result(self, done: Any, index: int) -> Found:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(done)
        except exceptions.RayActorError as error:
            raise UserError(
                "[cluster]",
                f"piece {index} ended {RETRIES + 1} workers: {error}",
                "workers that live",
                "look at the memory of the machines; a larger `cpus` or `gpus` gives each worker "
                "more of one",
            ) from None
        except exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from None


class _Worker:
    """One of them."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make, self._function = make, None

    def run(self, task: Any) -> Any:
        """Return what is found for a piece."""
        if self._function is None:
            self._function = self._make()
        return self._function(task)


def connect(config: ClusterConfig) -> Callable[[], None]:
    """Reach or start Ray; return what leaves it again, once.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    ray = import_ray()
    if not _open:
        root = str(Path(__file__).resolve().parents[1])
        # Workers on this machine begin with this process's environment.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, os.environ.get("PYTHONPATH", "")])
        )
        here: dict[str, Any] = {"address": config.address}
        if not config.address:
            cores = config.workers * config.cpus
            here = {"address": "local", "num_cpus": max(1, round(cores + 0.49))}
            here["include_dashboard"] = False
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(log_to_driver=False, logging_level="error", **here)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                "[cluster], key 'address'",
                f"{config.address!r}: {error}",
                "a Ray cluster that is running, or nothing for one on this machine",
                "ray start --head on one machine, ray start --address … on the others",
            ) from None
        finally:
            # Ray puts its own in, which ends at once what would be finished first.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
    mark = object()
    _open.add(mark)

    def leave() -> None:
        if mark in _open:
            _open.remove(mark)
            if not _open:
                ray.shutdown()

    return leave


def start_with_room(
    ray: Any, config: ClusterConfig, gpus: float, start: Callable[[], None]
) -> None:
    """Start workers on a cluster that has room for them, or is to get it; see `require_room`.

    A cluster that starts machines by itself does so for workers that wait for a place, so there
    they are started first. Elsewhere they are not: one that is killed while it starts may keep its
    core from others for ever (seen with Ray 2.60).
    """
    if not config.wait_s:
        require_room(ray, config, gpus)
    start()
    if config.wait_s:
        require_room(ray, config, gpus)


def require_room(ray: Any, config: ClusterConfig, gpus: float) -> None:
    """Wait until a cluster has cores and GPUs for its workers; refuse those it never has room for.

    Ray does not say whether a cluster starts machines by itself, so the configuration does.

    Args:
        ray: Ray.
        config: The cluster.
        gpus: Of each worker.

    Raises:
        UserError: There is no room after `config.wait_s`: they would wait for ever.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, also where a stage holds them back.
    """
    until = time.monotonic() + config.wait_s
    says = True
    while short := _short(ray.cluster_resources(), config, gpus):
        what, found = short
        left = until - time.monotonic()
        if left <= 0.0:
            waited = f", after {config.wait_s:g} s" if config.wait_s else ""
            raise UserError(
                "[cluster]",
                f"{config.workers} workers with {found} in all{waited}",
                f"at most as many as the cluster has {what}s for",
                "lower their number or what each takes, or let more machines join; for a cluster "
                f"that starts machines by itself {'raise' if waited else 'set'} wait_s",
            )
        if says:
            says = False
            print(
                f"waiting up to {config.wait_s:g} s for machines: {config.workers} workers with "
                f"{found} in all",
                file=sys.stderr,
            )
        time.sleep(min(1.0, left))
        check_all()


def _short(has: dict[str, float], config: ClusterConfig, gpus: float) -> tuple[str, str] | None:
    """Return what a cluster has too little of, and how little; None where there is room."""
    for what, each in (("CPU", config.cpus), ("GPU", gpus)):
        if config.workers * each > has.get(what, 0.0) + 1e-6:
            return what, f"{each:g} {what} each, on {has.get(what, 0.0):g}"
    return None


def import_ray() -> Any:
    """Return Ray.

    Raises:
        UserError: It is not installed.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            "[cluster]",
            f"ray cannot be imported: {error}",
            "the package ray",
            f"{sys.executable} -m pip install -e '.[ray]', or remove the table",
        ) from None
