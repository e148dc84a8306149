"""Evaluate checkpoints: samples, verdicts and figures with intervals.

    python -m eval.run --model FOLDER --suites gsm8k=test.jsonl math=test.jsonl --n 8
    python -m eval.run --config pipeline/configs/cpu.toml [--checkpoints sft grpo]

The first form evaluates one model folder or hub id; the second every training stage of a run.
What is complete is skipped, what was interrupted goes on. `--engine.KEY VALUE` chooses how samples
are drawn (`--engine.kind vllm`), `--checker.KEY VALUE` who grades them, `--sandbox.KEY VALUE` the
limits of programs (with `--tool-rounds`).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.arguments import Arguments, at_least, unknown_argument, whole_numbers
from data_prep.config import Config, fingerprint, plugin_config, validate
from data_prep.errors import UserError, command, nearest
from data_prep.jsonl import read_json, read_rows
from data_prep.manifest import read_manifest
from data_prep.run_folder import folder_name
from eval.evaluate import Job, evaluate, prompts_of, sandbox_of
from eval.models import check_model, fetch_model
from eval.profile import load_evaluation_profile
from eval.suites import Suite, choose_suites
from pipeline.config import EvaluateConfig, RunConfig, load_run
from pipeline.engines import EngineConfig
from pipeline.generate import checkpoint_of
from pipeline.methods import create_method
from pipeline.verify import check_checker
from verifiers.plain import plain


class EngineChoice(Config):
    """A table with an engine in it, so that its own model checks the keys."""

    engine: plugin_config("pipeline.engines")  # type: ignore[valid-type]


def dotted(
    arguments: list[str], tables: Sequence[str], options: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return table → key → value of `--TABLE.KEY VALUE` pairs.

    Args:
        arguments: What the parser did not know.
        tables: Tables that may be named.
        options: What the parser knows, to suggest from.

    Raises:
        UserError: An argument is not of that form.
    """
    found: dict[str, dict[str, Any]] = {table: {} for table in tables}
    forms = " or ".join(f"--{table}.KEY VALUE" for table in tables)
    words = iter(arguments)
    for word in words:
        table, dot, key = word.removeprefix("--").partition(".")
        if not word.startswith("--") or not dot or table not in found:
            raise unknown_argument(word, options, forms)
        key, equals, value = key.partition("=")
        if not equals:
            value = next(words, None)
            if value is None:
                raise UserError("command line", f"{word} without a value", "a value", "add it")
        found[table][key.replace("-", "_")] = value
    return found


def engine_config(table: dict[str, Any], base: EngineConfig | None = None) -> EngineConfig:
    """Return the engine that a table describes.

    Args:
        table: Keys from the command line.
        base: Engine whose settings stand where its kind is kept.

    Raises:
        UserError: There is no such engine, or it does not know a key.
    """
    if base is not None and table.get("kind", base.kind) == base.kind:
        table = base.model_dump() | table
    return validate(EngineChoice, {"engine": {"kind": "embedded"} | table}, "command line").engine


def jobs_of_run(
    run: RunConfig,
    config: EvaluateConfig,
    engine: EngineConfig,
    names: list[str],
    results: Path | None = None,
) -> list[Job]:
    """Return a job for every training stage whose checkpoint is there.

    Args:
        run: The run.
        config: What is measured.
        engine: Draws the samples.
        names: Training stages; empty takes all that are there.
        results: Where the evaluations go; by default into the run folder.

    Raises:
        UserError: A checkpoint that was asked for is not there, or none is.
    """
    if engine.takes != "tokens":
        raise UserError(
            "--config",
            f"engine.kind = {engine.kind!r}: an endpoint has no checkpoint of this run",
            "an engine that samples from a model folder",
            "evaluate what the endpoint serves with --model NAME",
        )
    out = Path(run.out)
    trained = [s.name for s in run.train if create_method(s.method).trains == "policy"]
    for name in names:
        if name not in trained:
            raise UserError(
                "--checkpoints",
                f"no training stage {name!r} {nearest(name, trained)}".rstrip(),
                f"one of {', '.join(trained)}",
                "mend the name",
            )
    chosen = [n for n in trained if n in names] if names else trained
    if config.reward_model:
        found = {"reward_model": str(checkpoint_of(run, config.reward_model))}
        config = config.model_copy(update=found)
    missing = [n for n in chosen if not (out / n / "checkpoint").is_dir()]
    if missing and (names or len(missing) == len(chosen)):
        raise UserError(
            str(out / missing[0] / "checkpoint"),
            "no such checkpoint",
            "a complete training stage",
            "run `python -m pipeline.run` first",
        )
    for name in missing:
        print(f"{name}: no checkpoint yet, left out", file=sys.stderr)
    suites = _suites(config, out / "data" / "test.jsonl")
    return [
        Job(
            name,
            out / name / "checkpoint",
            "",
            config,
            engine,
            run.seed,
            suites,
            results or out,
            run.cluster,
        )
        for name in chosen
        if name not in missing
    ]


def job_of_model(
    model: str, name: str, config: EvaluateConfig, engine: EngineConfig, seed: int, out: Path
) -> Job:
    """Return the job of one model: a folder, a hub id, or a name at the engine's endpoint."""
    if engine.takes == "messages":
        served = f"{model} by {fingerprint(engine.deciding(model))}"
        label = folder_name(name or Path(model).name, "--name")
        return Job(label, Path(model), served, config, engine, seed, _suites(config, Path()), out)
    folder, identity = fetch_model(model)
    check_model(folder, getattr(engine, "trust_remote_code", False))
    # A checkpoint of a run has that run's held-out problems near it.
    nearby = folder.resolve().parent.parent / "data" / "test.jsonl"
    label = name or (
        folder.resolve().parent.name if folder.name == "checkpoint" else Path(model).name
    )
    if not name and config.profile != "boxed":
        label += f"-{Path(config.profile).stem}"
    folder_name(label, "--name")
    manifest = out / f"eval-{label}" / "manifest.json"
    if manifest.is_file():
        other = str(read_manifest(manifest.parent)["counts"].get("model", folder))
        if Path(other).resolve() != folder.resolve():
            raise UserError(
                str(manifest.parent),
                f"holds the evaluation of {other}",
                f"of {folder}, or nothing",
                "give this model another --name, or another --out",
            )
    return Job(label, folder, identity, config, engine, seed, _suites(config, nearby), out)


def _suites(config: EvaluateConfig, embedded: Path, may_come: bool = False) -> tuple[Suite, ...]:
    """Return the suites; the embedded one is of this file where it is there, or will come."""
    paths = dict(config.paths)
    if may_come or embedded.is_file():
        paths.setdefault("embedded", str(embedded))
    return tuple(choose_suites(config.suites, paths))


def refuse(run: RunConfig) -> None:
    """Refuse an evaluation of a run that cannot work, before the run's first stage.

    Args:
        run: A run with an `evaluate` table.

    Raises:
        UserError: A suite, its file, the profile, the sandbox's limits, the checker or the reward
            model is not there or does not fit.
    """
    config = run.evaluate
    if config is None:
        return
    where = "evaluate.suites"
    suites = _suites(config, Path(run.out) / "data" / "test.jsonl", may_come=run.data is not None)
    names = [suite.name for suite in suites]
    for name in config.paths:
        if name not in names:
            raise UserError(
                f"evaluate.paths, key {name!r}",
                f"no suite of that name is evaluated {nearest(name, names)}".rstrip(),
                f"one of {', '.join(names)}",
                "mend the name, or add it to evaluate.suites",
            )
    for suite in suites:
        if suite.name == "embedded" and run.data is not None:
            continue  # made by the data stage
        if suite.config.path and not Path(suite.config.path).is_file():
            raise UserError(
                f"{where}, suite {suite.name!r}",
                f"no such file: {suite.config.path}",
                "a file of the suite's published format",
                "mend evaluate.paths",
            )
        if suite.name == "embedded" and not suite.config.path:
            suite.load()  # which says what is missing
    profile, _ = load_evaluation_profile(config.profile)
    checkers = [config.checker] if config.checker else [profile.checker, *profile.checkers.values()]
    for checker in checkers:
        check_checker(checker, "evaluate.checker")
    sandbox_of(config)
    stages = [stage.name for stage in run.train]
    reward = config.reward_model
    if reward and reward not in stages and not Path(reward).exists():
        raise UserError(
            "evaluate.reward_model",
            f"{reward!r} is no training stage, folder or file {nearest(reward, stages)}".rstrip(),
            f"one of {', '.join(stages)}, a reward model's folder, or a plug-in file",
            "mend the name",
        )


def table(folders: list[Path]) -> str:
    """Return the figures of evaluated checkpoints as a text table with 95 % intervals."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for folder in folders:
        for path in sorted(folder.glob("*/figures.json")):
            row = read_json(path)
            figures, n, k = row["figures"], row["n"], max(row["k"])
            names = ("greedy", f"avg@{n}", f"pass@{k}", f"maj@{k}", f"weighted@{n}", f"best@{k}")
            rows.append(
                {
                    "checkpoint": row["checkpoint"],
                    "suite": row["suite"],
                    "questions": str(row["questions"]),
                    **{name: percent(figures[name]) for name in names if name in figures},
                }
            )
            for metric, words in (
                ("not_run", "were not drawn: the prompt is longer than the model's context"),
                ("truncated", "reached the token limit"),
                ("timeouts", "timed out in grading"),
                ("unjudged", "could not be judged"),
            ):
                if figures[metric]["value"]:
                    share = 100 * figures[metric]["value"]
                    why = _why(path.with_name("verdicts.jsonl")) if metric == "unjudged" else ""
                    notes.append(
                        f"{row['checkpoint']} on {row['suite']}: {share:.1f} % of the "
                        f"samples {words} (counted as not correct){why}"
                    )
    # Suites may have been evaluated with different n.
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([row.get(name, "–") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rendered = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*rendered, "", "value [95 % interval over questions], in %", *notes])


def _why(verdicts: Path) -> str:
    """Return the most frequent reason for which samples could not be judged."""
    rows = read_rows(verdicts) if verdicts.is_file() else ()
    found = Counter(
        f"{row['outcome']}, {row['detail'] or row['rule']}"
        for _, row in rows
        if row["outcome"] in ("gold_unparseable", "error")
    )
    return plain(f"; most often: {found.most_common(1)[0][0]:.200}") if found else ""


def percent(figure: dict[str, Any]) -> str:
    """Return "71.3 [69.0, 73.5]"."""
    if figure["value"] is None:
        return "–"
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


TABLES = ("engine", "sandbox", "checker")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """Read the command line; return its options, and the tables that it names by `--TABLE.KEY`."""
    parser = Arguments("python -m eval.run", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model folder, hub id, or a name at an endpoint")
    what.add_argument("--config", help="a run's TOML: evaluate its checkpoints")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="training stages of the run")
    parser.add_argument("--suites", nargs="+", help="names, NAME=FILE, or files of one's own")
    parser.add_argument("--n", type=int, help="samples a question (0: greedy only)")
    parser.add_argument("--k", nargs="+", help="K of Pass@K and Maj@K, such as 1 2 4 8")
    parser.add_argument("--limit", type=int, help="first questions of each suite")
    parser.add_argument("--temperature", type=float, help="of the n samples")
    parser.add_argument("--top-p", type=float, help="nucleus of the n samples")
    parser.add_argument("--top-k", type=int, help="most probable tokens alone (0: all)")
    parser.add_argument("--min-p", type=float, help="least share of the best token's probability")
    parser.add_argument("--max-tokens", type=int, help="longest completion")
    parser.add_argument("--profile", help="evaluation profile: boxed, qwen_math, … or a .toml")
    parser.add_argument("--reward-model", help="folder or plug-in file: best@k and weighted@n")
    parser.add_argument("--tool-rounds", type=int, help="programs a sample may run (0: none)")
    parser.add_argument("--workers", type=int, help="judging processes")
    parser.add_argument("--shard-size", type=int, help="questions a shard")
    parser.add_argument("--bootstrap", type=int, help="resamples behind an interval")
    parser.add_argument("--seed", type=at_least(0), help="of samples and intervals")
    parser.add_argument("--name", default="", help="what figures call the model")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: the run folder, or runs/eval)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    known, rest = parser.parse_known_args(arguments)
    return known, dotted(rest, TABLES, parser.options())


def main(arguments: list[str]) -> None:
    """Command line."""
    known, tables = parse(arguments)
    given: dict[str, Any] = {
        key: value
        for key in EvaluateConfig.model_fields
        if (value := getattr(known, key, None)) is not None
    }
    if "k" in given:
        given["k"] = whole_numbers(known.k, "--k")
    if known.temperature == 0.0:
        raise UserError(
            "command line, --temperature",
            "0",
            "above 0, for the n samples; a greedy one is always drawn beside them",
            "for the greedy one alone leave it out and give --n 0",
        )
    given |= {name: tables[name] for name in ("sandbox", "checker") if tables[name]}
    for option, belongs in (("checkpoints", "config"), ("name", "model")):
        if getattr(known, option) and not getattr(known, belongs):
            raise UserError(
                f"--{option}",
                f"without --{belongs}",
                f"--{belongs}",
                f"leave it out, or give --{belongs}",
            )
    if known.config:
        run = load_run(known.config)
        base = run.evaluate or validate(EvaluateConfig, {}, "evaluate")
        engine = engine_config(tables["engine"], run.engine)
    else:
        run, engine = None, engine_config(tables["engine"])
        base = validate(EvaluateConfig, {"max_tokens": 512}, "evaluate")
        if not known.suites:
            raise UserError("--suites", "none", "at least one suite", "add --suites gsm8k")
    if "n" in given and "k" not in given:
        given["k"] = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= max(1, given["n"])]
    settings = base.model_dump() | given
    most = max(1, settings["n"])
    if any(not 1 <= k <= most for k in settings["k"]):
        raise UserError(
            "--k",
            f"{' '.join(map(str, settings['k']))} with n = {settings['n']}",
            f"every K between 1 and n = {most}",
            "draw more samples, or a smaller K",
        )
    config = validate(EvaluateConfig, settings, "command line")
    if run is not None:
        if known.seed is not None:
            run = run.model_copy(update={"seed": known.seed})
        jobs = jobs_of_run(run, config, engine, known.checkpoints, known.out)
    else:
        out = known.out or Path("runs/eval")
        jobs = [job_of_model(known.model, known.name, config, engine, known.seed or 0, out)]
    if known.dry_run:
        for job in jobs:
            print(f"{job.name}: {job.model} with {job.engine.model_dump_json()}")
        problems = {suite.name: suite.load(config.limit) for suite in jobs[0].suites}
        for name, rows in problems.items():
            print(plain(f"  {name}: {len(rows)} questions"))
        for name, lines in prompts_of(jobs[0], problems)[1].items():
            print(plain("\n  ".join([f"{name}:", *lines])))
        print(config.model_dump_json(indent=2))
        return
    folders = [evaluate(job) for job in jobs]
    print(plain(table(folders)))


if __name__ == "__main__":
    command(main)
