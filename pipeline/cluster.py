"""Engines and verifiers on the workers of a Ray cluster, where a run has a [cluster] table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.cluster import Cluster, ClusterConfig
from pipeline.engines import Engine, Group, Prompt, Sampling, create_engine
from pipeline.verify import open_pool
from verifiers import Verdict, VerifierPool

Ask = tuple[list[Prompt], Sampling]
Row = tuple[str, str]
# Answers that a worker judges at a time.
JUDGED = 512


class ClusterEngine:
    """Samples on workers that have an engine each.

    Args:
        config: The cluster.
        make: Returns a worker's engine.
    """

    policy_version = 0

    def __init__(self, config: ClusterConfig, make: Callable[[], Engine]) -> None:
        """Workers start with the first prompts."""
        self._cluster: Cluster[Ask, list[Group]] = Cluster(config, partial(_asker, make))
        self._is_open = False

    def drawn(
        self, parts: Iterable[list[Prompt]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Group]]]:
        """Yield (number of the part, its groups), as workers complete them."""
        if not self._is_open:
            self._cluster.__enter__()
            self._is_open = True
        yield from self._cluster.map((part, sampling) for part in parts)

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order."""
        return dict(self.drawn([prompts], sampling))[0]

    def load_weights(self, weights: Any, version: int) -> None:
        """A cluster samples from a checkpoint as it is."""
        raise NotImplementedError("workers of a cluster keep the weights of their checkpoint")

    def close(self) -> None:
        """End the workers."""
        self._cluster.close()


def _asker(make: Callable[[], Engine]) -> Callable[[Ask], list[Group]]:
    # On a CPU every vLLM would bind itself to the same first cores of a machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    engine = make()
    return lambda ask: engine.generate(*ask)


class ClusterPool:
    """Judges on workers that have a pool of processes each."""

    def __init__(self, cluster: Cluster[list[Row], list[Verdict]]) -> None:
        """Keep the cluster."""
        self._cluster = cluster

    def judged(self, parts: Iterable[list[Row]]) -> Iterator[tuple[int, list[Verdict]]]:
        """Yield (number of the part, its verdicts), as workers complete them."""
        yield from self._cluster.map(parts)

    def verify_many(self, rows: Sequence[Row]) -> list[Verdict]:
        """Return a verdict for each (gold, text), in order."""
        starts = range(0, len(rows), JUDGED)
        found = dict(self.judged([list(rows[s : s + JUDGED]) for s in starts]))
        return [verdict for index in range(len(starts)) for verdict in found[index]]


def _judge(
    checker: dict[str, Any], workers: int, time_limit_s: float
) -> Callable[[list[Row]], list[Verdict]]:
    pool = open_pool(checker, workers, time_limit_s)
    return pool.verify_many


def engine_of(config: Any, model: str | Path, cluster: ClusterConfig | None) -> Engine:
    """Return an engine with the weights of a model folder: here, or on a cluster's workers.

    Servers sample for whoever asks, so a cluster's workers do not stand between.
    """
    if not spreads(config, cluster):
        return create_engine(config, model)
    assert cluster is not None  # noqa: S101 - it spreads
    # Settled here: workers on other machines compute as this one would, or say that they cannot.
    return ClusterEngine(cluster, partial(create_engine, config.settled(model), model))


def spreads(config: Any, cluster: ClusterConfig | None) -> bool:
    """Return whether an engine runs on a cluster's workers."""
    return cluster is not None and getattr(config, "among", "each") != "leader"


def pool_of(
    checker: dict[str, Any], workers: int, time_limit_s: float, cluster: ClusterConfig | None
) -> AbstractContextManager[VerifierPool]:
    """Return a pool to be opened: judging processes here, or `workers` on each cluster's worker."""
    pool = open_pool(checker, workers, time_limit_s)  # refuses a wrong checker here, too
    if cluster is None:
        return pool
    return _cluster_pool(Cluster(cluster, partial(_judge, checker, workers, time_limit_s), False))


@contextmanager
def _cluster_pool(cluster: Cluster[list[Row], list[Verdict]]) -> Iterator[Any]:
    with cluster:
        yield ClusterPool(cluster)
