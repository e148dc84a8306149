"""Where a step's batch comes from: rows, pairs, a sample log, or the policy itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.errors import UserError
from data_prep.loader import Pairs, Steps
from data_prep.schema import Problem, read_problems
from pipeline.batch import Sequence
from pipeline.config import RunConfig, TrainConfig
from pipeline.engines import Engine, Prompt, create_engine
from pipeline.fixed import Rows, pair_of, read_log, solution_of
from pipeline.generate import checkpoint_of, render_prompts
from pipeline.methods import Method
from pipeline.ranks import ALONE, Ranks
from pipeline.records import rollout_figures
from pipeline.reward import RewardConfig, RewardMaker
from pipeline.rollout import Rollouts
from pipeline.scorer import load_scorer
from pipeline.verify import open_pool
from verifiers import VerifierPool

# A step's sequences with signal, and figures about how they came about.
Draw = Callable[[int], tuple[list[Sequence], dict[str, float]]]

Weights = Iterable[tuple[str, Tensor]]


@dataclass(slots=True)
class Data:
    """What a training stage learns from.

    Attributes:
        draw: A step's sequences; the same for the same step, whatever came before.
        steps: Steps in all.
        held_out: Sequences whose loss is a figure; empty where there are none.
        epoch: Batches after which the first comes again; 0 where none does.
        rollouts: Samples the policy, where the method does.
        check: Returns figures on held-out problems of a policy: weights and their version.
    """

    draw: Draw
    steps: int
    held_out: list[Sequence]
    epoch: int = 0
    rollouts: Rollouts | None = None
    check: Callable[[Weights, int], dict[str, float]] | None = None


def open_data(
    run: RunConfig,
    config: TrainConfig,
    method: Method,
    init: str | Path | None,
    tokenizer: Any,
    profile: str,
    context: int,
    work: Path,
    cleanup: ExitStack,
    ranks: Ranks = ALONE,
) -> Data:
    """Open the source that the method names."""
    folder = Path(run.out) / "data"
    if method.source == "policy":
        return _policy(run, config, method, str(init), tokenizer, profile, work, cleanup, ranks)
    if method.source == "rows":
        rows = Rows(run.rows, "train")
        _check_longest(config, rows.sequences.longest, context)
        last = bool(getattr(method.config, "last_turn_only", False))
        batches = (
            rows.sequences.length_grouped(config.batch_tokens, run.seed)
            if config.batch_tokens
            else _in_order(len(rows), config.batch)
        )
        kept = Rows(run.rows, "validation") if config.validate_every else None
        held_out = [] if kept is None else kept.take(range(len(kept)), last_turn_only=last)
        return _fixed(
            config, batches, lambda batch: rows.take(batch, last_turn_only=last), held_out
        )
    if method.source == "samples":
        log = read_log(Path(run.out) / "generate", Path(run.out) / "verify")
        if method.takes_steps:
            rewards = RewardMaker(RewardConfig(process="steps"), _decoder(tokenizer))
            rewards.fill_steps([sample for sample in log if sample.reward is not None])
        units = method.select(log, run.seed)
        if not units:
            unjudged = sum(sample.reward is None for sample in log)
            raise UserError(
                f"stage {config.name!r}",
                f"no sample of {len(log)} can be used"
                + (f"; {unjudged} could not be judged" if unjudged else ""),
                "correct samples (RFT), or correct and incorrect ones of one problem (pairs)",
                "sample more, or start from a model that solves some of the problems"
                + ("; the verdicts' `detail` says why some are missing" if unjudged else ""),
            )
        # Units of one batch stay apart: a group is a pair, or a single sample.
        data = _fixed(
            config,
            _in_order(len(units), config.batch),
            lambda batch: [
                sequence
                for number, index in enumerate(batch)
                for sequence in method.marked([s.in_group(number) for s in units[index]])
            ],
        )
        if config.validate_every:
            if method.trains == "scores":
                raise _nothing_held_out(config)
            engine, pool = _sampler(run, str(init), cleanup, ranks)
            data.check = _solver(run, config, engine, pool, tokenizer, profile)
        return data
    kind = Pairs if method.source == "pairs" else Steps
    name = "preference" if method.source == "pairs" else "steps"
    unit_of: Any = pair_of if method.source == "pairs" else solution_of
    judged = kind(folder / f"{name}_train.parquet")
    order = list(range(len(judged)))
    random.Random(f"{run.seed}/{config.name}/order").shuffle(order)  # noqa: S311 - an order, not a secret
    path = folder / f"{name}_validation.parquet"
    kept_rows = kind(path) if config.validate_every and path.is_file() else None
    held = [s for i in range(len(kept_rows or ())) for s in method.marked(unit_of(kept_rows, i))]
    _check_longest(config, judged.longest, context)
    return _fixed(
        config,
        _in_order(len(order), config.batch),
        lambda batch: [s for place in batch for s in method.marked(unit_of(judged, order[place]))],
        held,
    )


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def _in_order(count: int, size: int) -> list[range]:
    """Return batches of `size` in order, fewer in the last one."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _nothing_held_out(config: TrainConfig) -> UserError:
    return UserError(
        f"stage {config.name!r}, key 'validate_every'",
        "the data stage has nothing held out for this method",
        "held-out rows, or validate_every = 0",
        "give a source validation problems, or set validate_every = 0",
    )


def _fixed(
    config: TrainConfig,
    batches: Seq[Seq[int]],
    take: Callable[[Iterable[int]], list[Sequence]],
    held_out: list[Sequence] | None = None,
) -> Data:
    """Batches of what lies ready, in their order, epoch after epoch."""
    if not batches:
        raise UserError(
            f"stage {config.name!r}",
            "the data stage has no training row for this method",
            "at least one",
            "give [data] or [mixture] a source of such rows",
        )
    if config.validate_every and held_out == []:
        raise _nothing_held_out(config)

    def draw(step: int) -> tuple[list[Sequence], dict[str, float]]:
        return take(batches[step % len(batches)]), {}

    return Data(draw, config.steps or len(batches), held_out or [], len(batches))


def _check_longest(config: TrainConfig, longest: int, context: int) -> None:
    if longest > context:
        raise UserError(
            f"stage {config.name!r}",
            f"a row of {longest} tokens, and a model whose context holds {context}",
            "rows that fit",
            "lower max_length of [data] or [mixture], or raise model.context",
        )


def _sampler(
    run: RunConfig, init: str, cleanup: ExitStack, ranks: Ranks
) -> tuple[Engine, VerifierPool]:
    is_shared = getattr(run.engine, "among", "each") == "leader"
    own = None if is_shared and not ranks.leads else create_engine(run.engine, init)
    engine = ranks.engine(own, is_shared)
    cleanup.callback(engine.close)
    verify = run.verify
    pool = open_pool(verify.checker, verify.workers, verify.time_limit_s)
    return engine, ranks.pool(cleanup.enter_context(pool))


def _policy(
    run: RunConfig,
    config: TrainConfig,
    method: Method,
    init: str,
    tokenizer: Any,
    profile: str,
    work: Path,
    cleanup: ExitStack,
    ranks: Ranks,
) -> Data:
    folder = Path(run.out) / "data"
    if config.prompts == "preferences":
        rows = Pairs(folder / "preference_train.parquet")
        distinct = {tuple(rows[i].prompt): i for i in range(len(rows))}
        prompts = [Prompt(f"preference-{i}", tokens) for tokens, i in distinct.items()]
        problems = [Problem(p.id, "", "", "preferences", "train") for p in prompts]
    else:
        problems = list(read_problems(folder / "train.jsonl"))
        prompts = render_prompts(problems, tokenizer, profile)
    engine, pool = _sampler(run, init, cleanup, ranks)
    reward = config.reward
    device = run.engine.device  # type: ignore[attr-defined]
    rewards = RewardMaker(
        reward,
        _decoder(tokenizer),
        load_scorer(checkpoint_of(run, reward.model_init), "end", device, ranks)
        if reward.model
        else None,
        load_scorer(checkpoint_of(run, reward.process_init), "steps", device, ranks)
        if reward.process == "model"
        else None,
    )
    sampling = run.sampling.of_run(n=config.group_size, seed=run.seed)
    rollouts = Rollouts(
        problems,
        prompts,
        engine,
        pool,
        rewards,
        method,
        sampling,
        config.batch,
        work / "rollouts",
        ranks,
    )

    def sampled(step: int) -> tuple[list[Sequence], dict[str, float]]:
        drawn = rollouts.draw(step)
        kept = method.advantages(drawn.chosen)
        figures = rollout_figures(drawn.everything, kept)
        figures["samples"] = drawn.samples
        if method.refill:
            figures["refill_rounds"] = drawn.rounds
        if config.staleness and kept:
            lags = [sequence.staleness for sequence in kept]
            figures |= {"staleness_mean": sum(lags) / len(lags), "staleness_max": max(lags)}
        return kept, figures

    data = Data(sampled, config.steps, [], rollouts=rollouts)
    if config.validate_every:
        data.check = _solver(run, config, engine, pool, tokenizer, profile)
    return data


def _solver(
    run: RunConfig,
    config: TrainConfig,
    engine: Engine,
    pool: VerifierPool,
    tokenizer: Any,
    profile: str,
) -> Callable[[Weights, int], dict[str, float]]:
    """Return what tells the share of validation problems that greedy completions solve."""
    path = Path(run.out) / "data" / "validation.jsonl"
    asked = list(read_problems(path))[: config.validate_limit] if path.is_file() else []
    if not asked:
        raise UserError(
            f"stage {config.name!r}, key 'validate_every'",
            "the data stage has no validation problems",
            "problems to solve while training",
            "give a source validation problems, or set validate_every = 0",
        )
    sampling = run.sampling.of_run(n=1, seed=run.seed)
    greedy = sampling.model_copy(update={"temperature": 0.0})
    prompts = render_prompts(asked, tokenizer, profile)

    def check(weights: Weights, version: int) -> dict[str, float]:
        engine.load_weights(weights, version)
        groups = engine.generate(prompts, greedy)
        answers = [
            (problem.answer, completion.text)
            for problem, group in zip(asked, groups, strict=True)
            for completion in group.completions
        ]
        verdicts = [v for v in pool.verify_many(answers) if v.is_scorable]
        share = sum(v.is_correct for v in verdicts) / max(1, len(verdicts))
        return {"validation_accuracy": share}

    return check
