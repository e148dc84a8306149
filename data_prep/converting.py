"""Worker processes that convert chunks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from data_prep.chunk import Converter, Task, is_whole
from data_prep.cluster import Cluster, ClusterConfig
from data_prep.decontaminate import Index, Question
from data_prep.errors import UserError
from data_prep.formatting import load_formatter
from data_prep.interruption import Interruption
from data_prep.mixture_config import MixtureConfig
from data_prep.plugins import load_plugin
from data_prep.progress import progress
from data_prep.reading import Rejected, convert, read_stretch, stretches
from data_prep.schema import Problem
from data_prep.sources import questions as any_questions
from data_prep.tokenizer import load_tokenizer

# Set once in every worker process by `_start`.
_worker: dict[str, Converter] = {}


def questions(config: MixtureConfig) -> list[Question]:
    """Return the questions of every evaluation suite.

    Raises:
        UserError: A suite's row is malformed.
    """
    found = []
    for suite in config.suites:
        module = load_plugin("data_prep.sources", suite.source.kind)
        for stretch in stretches(suite.source, rows=0):
            for place, raw in read_stretch(stretch):
                item = convert(module, place, raw)
                if isinstance(item, Rejected) and item.reason != "bad_row":
                    # A question without a usable gold is a question all the same.
                    item = convert(any_questions, place, raw)
                if isinstance(item, Rejected):
                    assert item.error is not None  # noqa: S101 - bad rows have one
                    raise item.error
                if not isinstance(item, Problem):
                    raise UserError(
                        f"mixture.suites, {suite.name!r}, kind {suite.source.kind!r}",
                        f"it gives {type(item).__name__} rows",
                        "a source of problems",
                        'name another kind; "questions" reads any file of questions',
                    )
                found.append(Question(suite.name, item.where, item.question))
    return found


def convert_chunks(
    config: MixtureConfig,
    seed: int,
    folder: Path,
    tasks: Sequence[Task],
    cluster: ClusterConfig | None = None,
) -> None:
    """Convert every chunk that is not whole yet.

    Args:
        config: The mixture's.
        seed: Decides ranks.
        folder: The stage's folder, with the tokenizer.
        tasks: All chunks.
        cluster: Ray workers that do it; None for processes of this machine.

    Raises:
        UserError: A row is bad and its policy is "fail".
    """
    left = [task for task in tasks if not is_whole(task)]
    start = (config, seed, str(folder / "tokenizer"))
    with (
        progress("convert", "chunk", len(left)) as bar,
        Interruption("chunk") as interruption,
    ):
        if cluster is not None:
            with Cluster(cluster, partial(_runner, start)) as workers:
                for _ in workers.map(left):
                    bar.update()
                    interruption.check()
            return
        if config.workers == 1 or len(left) < 2:
            converter = _converter(*start)
            for task in left:
                converter.run(task)
                bar.update()
                interruption.check()
            return
        # Forked from a clean server that has the imports, not from here: the tokenizer's threads
        # do not survive a fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.converting"])
        with context.Pool(config.workers, _start, start) as pool:
            for _ in pool.imap_unordered(_run, left):
                bar.update()
                interruption.check()
            pool.close()
            pool.join()


def _converter(config: MixtureConfig, seed: int, tokenizer: str) -> Converter:
    formatter = load_formatter(load_tokenizer(tokenizer), config.profile)
    index = Index(questions(config)) if config.suites else None
    return Converter(config, seed, formatter, index)


def _runner(start: tuple[MixtureConfig, int, str]) -> Callable[[Task], None]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return _converter(*start).run


def _start(config: MixtureConfig, seed: int, tokenizer: str) -> None:
    # One process a core is enough; the tokenizer's own threads would only get in the way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is the starter's matter.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker["converter"] = _converter(config, seed, tokenizer)


def _run(task: Task) -> None:
    _worker["converter"].run(task)
