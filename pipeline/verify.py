"""A verdict for every sample of the log, in the log's order.

    python -m pipeline.verify --config pipeline/configs/cpu.toml [--workers 2 …]

Shards are written whole, so a killed run repeats at most one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.arguments import KEYS, Arguments
from data_prep.config import override
from data_prep.errors import UserError, command
from data_prep.files import Journal
from data_prep.interruption import Interruption
from data_prep.jsonl import read_rows, write_rows
from data_prep.progress import progress
from data_prep.run_folder import Stage
from pipeline.config import RunConfig, VerifyConfig, load_run
from pipeline.samples import read_samples
from verifiers import Outcome, Verdict, VerifierPool, load_checker
from verifiers.plain import plain


def open_pool(checker: dict[str, Any], workers: int, time_limit_s: float = 1.0) -> VerifierPool:
    """Return a pool of judging processes for a checker table.

    Raises:
        UserError: There is no such checker, or it does not know an option.
    """
    kind, options = check_checker(checker, "checker")
    return VerifierPool(kind=kind, options=options, workers=workers, time_limit_s=time_limit_s)


def check_checker(checker: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return a checker table's kind and options.

    Raises:
        UserError: There is no such checker, or it does not know an option.
    """
    options = dict(checker)
    kind = str(options.pop("kind", "boxed"))
    try:
        load_checker(kind, options)
    except Exception as error:  # a checker of the user's own may raise anything
        raise UserError(
            where,
            str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}",
            "a kind of verifiers/checkers or a .py file, with options that it takes",
            "mend it; `python -m verifiers check FILE.py` tries one of your own",
        ) from None
    return kind, options


def samples_in(folder: Path) -> Iterable[Path]:
    """Return the shards of a generate stage, in order."""
    return sorted(folder.glob("samples-*.jsonl"))


def shares(
    pool: VerifierPool, parts: Iterable[list[tuple[str, str]]]
) -> Iterator[tuple[int, list[Verdict]]]:
    """Yield (number of the part, its verdicts): in turn, or as a cluster's workers are done."""
    from pipeline.cluster import ClusterPool

    if isinstance(pool, ClusterPool):
        return pool.judged(parts)
    return ((number, pool.verify_many(part)) for number, part in enumerate(parts))


def verify(run: RunConfig, config: VerifyConfig) -> Path:
    """Run the stage; return its folder."""
    out = Path(run.out)
    source = out / "generate"
    settings = config.model_dump(mode="json", exclude={"workers"})
    stage = Stage(out, "verify", settings, {"generate": source})
    if stage.is_complete:
        return stage.final
    with stage:
        return _verify(run, config, source, stage)


def _verify(run: RunConfig, config: VerifyConfig, source: Path, stage: Stage) -> Path:
    from pipeline.cluster import pool_of

    golds = {row["problem_id"]: row["gold"] for _, row in read_rows(source / "prompts.jsonl")}
    work = stage.begin()
    outcomes: Counter[str] = Counter()
    journal = Journal(work)
    with (
        pool_of(config.checker, config.workers, config.time_limit_s, run.cluster) as pool,
        Interruption("shard") as interruption,
    ):
        shards = list(samples_in(source))
        verdict_files = [work / s.name.replace("samples", "verdicts") for s in shards]
        left = [
            (shard, target)
            for shard, target in zip(shards, verdict_files, strict=True)
            if not journal.holds(target)
        ]
        asked = ([(golds[s.problem_id], s.text) for s in read_samples(shard)] for shard, _ in left)
        with progress("verify", "shard", len(shards), len(shards) - len(left)) as bar:
            for number, verdicts in shares(pool, asked):
                shard, target = left[number]
                write_rows(
                    target,
                    (
                        {"problem_id": s.problem_id, "sample_index": s.sample_index, **judged(v)}
                        for s, v in zip(read_samples(shard), verdicts, strict=True)
                    ),
                    journal,
                )
                bar.update()
                interruption.check()
    failed: Counter[str] = Counter()
    for path in verdict_files:
        for _, row in read_rows(path):
            outcomes[row["outcome"]] += 1
            if not Verdict(Outcome(row["outcome"])).is_scorable:
                failed[f"{row['outcome']}, {row['detail'] or row['rule']}"] += 1
    if failed:
        reason, count = failed.most_common(1)[0]
        print(
            plain(
                f"warning: {failed.total()} of {outcomes.total()} samples could not be judged and "
                f"are not trained on; most often ({count}): {reason}"
            ),
            file=sys.stderr,
        )
    return stage.complete(samples=sum(outcomes.values()), outcomes=dict(sorted(outcomes.items())))


def judged(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as a row, without its time, which differs between equal runs."""
    row = verdict.to_dict()
    row.pop("ms", None)
    return row


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m pipeline.verify", __doc__, KEYS.format("[verify]", "--workers 4"))
    parser.add_argument("--config", required=True, help="a run's TOML")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved stage and stop")
    known, rest = parser.parse_known_args(arguments)
    run = load_run(known.config)
    config = override(
        run.verify, rest, program="python -m pipeline.verify", description=str(__doc__)
    )
    if known.dry_run:
        print(config.model_dump_json(indent=2))
        return
    folder = verify(run, config)
    print(f"verdicts: {folder}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
