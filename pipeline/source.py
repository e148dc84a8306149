"""Where a step's batch comes from: supervised rows, a sample log, or the policy itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError
from data_prep.schema import read_problems
from pipeline.batch import Sequence
from pipeline.config import RunConfig, TrainConfig
from pipeline.engines import Engine, Prompt, create_engine
from pipeline.fixed import Rows, read_log
from pipeline.generate import render_prompts
from pipeline.methods import Method
from pipeline.records import rollout_figures
from pipeline.rollout import Rollouts
from pipeline.verify import open_pool

# A step's sequences with signal, and figures about how they came about.
Draw = Callable[[int], tuple[list[Sequence], dict[str, float]]]


class Source(NamedTuple):
    """Where a stage's batches come from.

    Attributes:
        draw: Draws a step's batch.
        total: Number of steps.
        engine: Samples for the online methods, else None.
        prompts: What the engine is asked, else nothing.
    """

    draw: Draw
    total: int
    engine: Engine | None = None
    prompts: tuple[Prompt, ...] = ()


def open_source(
    run: RunConfig,
    config: TrainConfig,
    method: Method,
    init: str | Path | None,
    tokenizer: Any,
    profile: str,
    context: int,
    work: Path,
    cleanup: ExitStack,
) -> Source:
    """Return how a step's batch is drawn."""
    out = Path(run.out)
    if method.source == "rows":
        rows = Rows(out / "data", "train")
        if rows.longest > context:
            raise UserError(
                f"stage {config.name!r}",
                f"a row of {rows.longest} tokens, and a model whose context holds {context}",
                "rows that fit",
                "lower data.max_length, or raise model.context",
            )
        epoch = math.ceil(len(rows) / config.batch)
        total = config.steps or epoch

        def supervised(step: int) -> tuple[list[Sequence], dict[str, float]]:
            first = step % epoch * config.batch
            return rows.take(first, min(first + config.batch, len(rows))), {}

        return Source(supervised, total)
    if method.source == "samples":
        log = read_log(out / "generate", out / "verify")
        units = method.select(log, run.seed)
        if not units:
            raise UserError(
                f"stage {config.name!r}",
                f"no sample of {len(log)} can be used",
                "correct samples (RFT), or correct and incorrect ones of one problem (DPO)",
                "sample more, or start from a model that solves some of the problems",
            )
        epoch = math.ceil(len(units) / config.batch)
        total = config.steps or epoch

        def selected(step: int) -> tuple[list[Sequence], dict[str, float]]:
            first = step % epoch * config.batch
            chosen = units[first : first + config.batch]
            # Units of one batch stay apart: a group is a pair, or a single sample.
            return [
                sequence.in_group(number) for number, unit in enumerate(chosen) for sequence in unit
            ], {}

        return Source(selected, total)
    problems = list(read_problems(out / "data" / "train.jsonl"))
    engine = create_engine(run.engine, str(init))
    cleanup.callback(engine.close)
    pool = cleanup.enter_context(
        open_pool(run.verify.checker, run.verify.workers, run.verify.time_limit_s)
    )
    sampling = run.sampling.of_run(n=config.group_size, seed=run.seed)
    prompts = render_prompts(problems, tokenizer, profile)
    rollouts = Rollouts(
        problems,
        prompts,
        engine,
        pool,
        method,
        sampling,
        config.batch,
        work / "rollouts",
    )

    def sampled(step: int) -> tuple[list[Sequence], dict[str, float]]:
        drawn = rollouts.draw(step)
        kept = method.advantages(drawn.chosen)
        figures = rollout_figures(drawn.everything, len(kept))
        if method.refill:
            figures["refill_rounds"] = drawn.rounds
        if config.staleness and kept:
            lags = [sequence.staleness for sequence in kept]
            figures |= {"staleness_mean": sum(lags) / len(lags), "staleness_max": max(lags)}
        return kept, figures

    return Source(sampled, config.steps, engine, tuple(prompts))
