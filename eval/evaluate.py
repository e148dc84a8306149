"""One checkpoint over its suites: samples, verdicts, figures, each kept beside the other.

A stage folder `eval-<name>` holds one folder a suite:

    problems.jsonl          the suite's problems
    prompts.jsonl           the tokens that completions follow
    generation.json         everything that decides the samples
    samples-00000.jsonl …   n samples a problem at the temperature
    greedy-00000.jsonl …    one greedy sample a problem
    grading.json            everything that decides the verdicts
    verdicts.jsonl          graded rows of the samples
    greedy_verdicts.jsonl   graded rows of the greedy samples
    scoring.json            everything that decides a reward model's scores, where there is one
    scores.jsonl            its score of every sample
    figures.json            every figure, a function of the rows above

Samples are drawn into a log beside it that is never changed (see `eval.sample_log`); verdicts and
scores are taken over from the folder as it was while what decides them stays the same. Suites
that were evaluated before with the same weights stay in the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.cluster import ClusterConfig
from data_prep.config import fingerprint, validate
from data_prep.errors import UserError
from data_prep.files import Journal, file_hash
from data_prep.jsonl import read_json, write_json, write_rows
from data_prep.manifest import input_hash
from data_prep.run_folder import Stage
from data_prep.schema import Problem
from eval.figures import SCHEMA, suite_figures
from eval.grading import Graded, grade, read_graded, write_graded
from eval.models import check_model
from eval.profile import EvaluationProfile, load_evaluation_profile
from eval.prompting import preflight, suite_conversations, suite_formatter, suite_prompts
from eval.reward_model import RewardModel, read_scores
from eval.sample_log import link, link_folder, log_folder, log_shards, restore
from eval.sandbox import SandboxConfig, Session
from eval.suites import Suite
from eval.tools import ToolEngine
from pipeline.cluster import ClusterEngine, pool_of, spreads
from pipeline.config import EvaluateConfig
from pipeline.engines import Engine, EngineConfig, Group, Prompt, Sampling, create_engine
from pipeline.generate import generate_shards
from pipeline.model import load_tokenizer
from pipeline.samples import read_samples
from verifiers import VerifierPool
from verifiers.plain import plain


@dataclass(frozen=True, slots=True)
class Job:
    """One checkpoint to evaluate.

    Attributes:
        name: What figures call the checkpoint.
        model: Model folder.
        identity: What decides the weights when the folder is not to be hashed (a hub id with
            its revision); empty hashes the folder.
        config: What is measured.
        engine: Its plug-in's configuration.
        seed: Of samples and resampling.
        suites: What is measured on.
        out: Folder that `eval-<name>` goes to.
        cluster: Ray workers that sample and judge; None for this machine's own processes.
    """

    name: str
    model: Path
    identity: str
    config: EvaluateConfig
    engine: EngineConfig
    seed: int
    suites: tuple[Suite, ...]
    out: Path
    cluster: ClusterConfig | None = None


class _LazyEngine:
    """An engine that loads its weights when the first missing shard asks for them."""

    policy_version = 0

    def __init__(self, job: Job) -> None:
        self._job = job
        self._engine: Engine | None = None

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        """Return one group a prompt, in order."""
        if self._engine is None:
            self._engine = self._create()
        return self._engine.generate(prompts, sampling)

    def spread(self) -> Engine:
        """Return the engine that shards are asked of: this one, or the cluster's."""
        if not spreads(self._job.engine, self._job.cluster):
            return self
        if self._engine is None:
            self._engine = self._create()
        return self._engine

    def _create(self) -> Engine:
        cluster = self._job.cluster
        if cluster is not None and spreads(self._job.engine, cluster):
            # Settled here: what the workers compute with is what the plan says.
            engine = self._job.engine.settled(self._job.model)
            job = replace(self._job, engine=engine, cluster=None)
            return ClusterEngine(cluster, partial(_LazyEngine, job))
        engine = create_engine(self._job.engine, self._job.model)
        config = self._job.config
        if not config.tool_rounds:
            return engine
        tokenizer = load_tokenizer(self._job.model)
        return ToolEngine(engine, tokenizer, config.tool_rounds, sandbox_of(config), config.workers)

    def load_weights(self, weights: Any, version: int) -> None:
        """An evaluation never changes weights."""
        raise NotImplementedError("an evaluated checkpoint keeps its weights")

    def close(self) -> None:
        """Give back what was loaded."""
        if self._engine is not None:
            self._engine.close()


def evaluate(job: Job) -> Path:
    """Evaluate one checkpoint, or find that it was; return its folder.

    Raises:
        UserError: The model or a suite cannot be read.
    """
    if job.engine.takes == "tokens":
        check_model(job.model, getattr(job.engine, "trust_remote_code", False))
    else:
        _refuse_without_tokens(job.config)
    if job.config.tool_rounds:
        Session(sandbox_of(job.config)).close()  # refuses now what it would refuse hours later
    weights = job.identity or input_hash(job.model)
    reward = RewardModel(job.config.reward_model, job.model) if job.config.reward_model else None
    problems = {suite.name: suite.load(job.config.limit) for suite in job.suites}
    profile, _ = load_evaluation_profile(job.config.profile)
    prompts, notes = prompts_of(job, problems)
    plans: dict[str, _Plan] = {}
    for suite in job.suites:
        name = suite.name
        generation = {
            "weights": weights,
            "prompts": fingerprint([[p.id, p.messages or p.token_ids] for p in prompts[name]]),
            "profile": job.config.profile,
            "stop": list(profile.stop),
            "tool_rounds": job.config.tool_rounds,
            "sandbox": sandbox_of(job.config).model_dump() if job.config.tool_rounds else {},
            "engine": job.engine.deciding(job.model),
            "n": job.config.n,
            "temperature": job.config.temperature,
            "top_p": job.config.top_p,
            "max_tokens": job.config.max_tokens,
            # Only where they are set, so that samples drawn before there were such keys stay good.
            **({"top_k": job.config.top_k} if job.config.top_k else {}),
            **({"min_p": job.config.min_p} if job.config.min_p else {}),
            "shard_size": job.config.shard_size,
            "seed": job.seed,
        }
        checker = job.config.checker or profile.checkers.get(suite.language, profile.checker)
        kind = str(checker.get("kind", ""))
        log = fingerprint(generation)
        grading = {
            "log": log,
            "language": suite.language,
            "problems": fingerprint([p.to_row() | {"where": ""} for p in problems[name]]),
            "checker": checker,
            "file": file_hash(Path(kind)) if kind.endswith(".py") and Path(kind).is_file() else "",
            "time_limit_s": job.config.time_limit_s,
        }
        scoring = {"log": log, "reward_model": reward.identity} if reward else {}
        plans[name] = _Plan(generation, grading, scoring)
    settings = {
        "figures": SCHEMA,
        "generation": {name: plan.generation for name, plan in plans.items()},
        "grading": {name: plan.grading for name, plan in plans.items()},
        "scoring": {name: plan.scoring for name, plan in plans.items()},
        "k": list(job.config.k),
        "bootstrap": job.config.bootstrap,
    }
    stage = Stage(job.out, f"eval-{job.name}", settings, {})
    if stage.is_complete:
        for name, plan in plans.items():
            restore(log_folder(job.out, job.name, name, plan.generation), stage.final / name)
        return stage.final
    with stage:
        work = stage.begin()
        journal = Journal(work)
        is_sound = stage.is_sound
        if stage.final.is_dir() and not is_sound:
            print(f"{stage.final}: damaged; nothing is taken over from it", file=sys.stderr)
        engine = _LazyEngine(job)
        samples = 0
        with ExitStack() as cleanup:
            cleanup.callback(engine.close)
            pools: dict[str, VerifierPool] = {}
            for name, rows in problems.items():
                print(plain(f"{job.name} on {name}: {len(rows)} questions"), file=sys.stderr)
                # Whole prompts are for --dry-run; here it is only that nobody samples blindly.
                print(
                    plain("\n".join(f"  {shorten(line)}" for line in notes[name])), file=sys.stderr
                )
                plan, folder = plans[name], work / name
                folder.mkdir(exist_ok=True)
                write_json(folder / "generation.json", plan.generation)
                if is_sound:
                    plan.adopt_judgements(stage.final / name, folder, journal)
                plan.write(folder)
                key = fingerprint(plan.grading["checker"])
                if key not in pools:
                    checker = plan.grading["checker"]
                    opened = pool_of(
                        checker, job.config.workers, job.config.time_limit_s, job.cluster
                    )
                    pools[key] = cleanup.enter_context(opened)
                samples += _suite(
                    job, name, rows, prompts[name], profile, engine, pools[key], reward, plan,
                    folder, journal,
                )  # fmt: skip
        for old in sorted(stage.final.glob("*/figures.json")):
            if is_sound and old.parent.name not in problems and _still_holds(old, weights):
                link_folder(old.parent, work / old.parent.name)
        return stage.complete(suites=list(problems), samples=samples, model=str(job.model))


def shorten(line: str, most: int = 160) -> str:
    """Return a line without its middle where it is longer than that."""
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"


@dataclass(frozen=True, slots=True)
class _Plan:
    """What decides one suite's samples, verdicts and scores; `scoring` is empty without any."""

    generation: dict[str, Any]
    grading: dict[str, Any]
    scoring: dict[str, Any]

    def adopt_judgements(self, old: Path, new: Path, journal: Journal) -> None:
        """Take over verdicts and scores that the same plan decided."""
        for note, plan, names in (
            ("grading.json", self.grading, ("verdicts.jsonl", "greedy_verdicts.jsonl")),
            ("scoring.json", self.scoring, ("scores.jsonl",)),
        ):
            if (old / note).is_file() and read_json(old / note) == plan:
                for name in filter(lambda name: (old / name).is_file(), names):
                    if not journal.holds(new / name):
                        journal.note(old / name, str((new / name).relative_to(journal.folder)))
                        link(old / name, new / name)

    def write(self, folder: Path) -> None:
        """Note what decides the verdicts and the scores."""
        for note, plan in (("grading.json", self.grading), ("scoring.json", self.scoring)):
            if plan:
                write_json(folder / note, plan)


def _still_holds(figures: Path, weights: str) -> bool:
    """Return whether a suite's figures are of these weights and this program."""
    generation = figures.with_name("generation.json")
    return (
        read_json(figures).get("schema") == SCHEMA
        and generation.is_file()
        and read_json(generation)["weights"] == weights
    )


def _refuse_without_tokens(config: EvaluateConfig) -> None:
    """Refuse what needs the tokens of samples, from an engine that gives text alone.

    Raises:
        UserError: Programs are to be run, or a reward model is to score.
    """
    for key, found in (
        ("tool_rounds", config.tool_rounds),
        ("reward_model", config.reward_model),
    ):
        if found:
            raise UserError(
                f"evaluate.{key}",
                f"{found!r} with an engine that gives text alone",
                "token ids, which samples go on from and a reward model reads",
                "remove the key, or sample with another engine",
            )


def sandbox_of(config: EvaluateConfig) -> SandboxConfig:
    """Return the limits of programs.

    Raises:
        UserError: A key is unknown or a value out of range.
    """
    return validate(SandboxConfig, config.sandbox, "evaluate.sandbox")


def prompts_of(
    job: Job, problems: Mapping[str, list[Problem]]
) -> tuple[dict[str, list[Prompt]], dict[str, list[str]]]:
    """Return the prompts of every suite, checked, and what the checks found to show.

    Args:
        job: The evaluation.
        problems: Suite name to its problems.

    Raises:
        UserError: The tokenizer, profile or an exemplar does not fit, or a check fails.
    """
    profile, path = load_evaluation_profile(job.config.profile)
    if job.engine.takes == "messages":
        return {
            suite.name: suite_conversations(problems[suite.name], profile, path, suite.language)
            for suite in job.suites
        }, {suite.name: [f"chat messages, profile {job.config.profile!r}"] for suite in job.suites}
    tokenizer = load_tokenizer(job.model)
    formatter = suite_formatter(job.model, tokenizer, profile)
    prompts, notes = {}, {}
    for suite in job.suites:
        name, rows = suite.name, problems[suite.name]
        prompts[name] = suite_prompts(
            rows, formatter, profile, path, suite.language, bool(job.config.tool_rounds)
        )
        notes[name] = [
            f"template of layout {formatter.layout!r}, profile {job.config.profile!r}",
            *preflight(prompts[name], tokenizer, profile.stop, rows),
        ]
    return prompts, notes


def _suite(
    job: Job,
    name: str,
    problems: list[Problem],
    prompts: list[Prompt],
    profile: EvaluationProfile,
    engine: _LazyEngine,
    pool: VerifierPool,
    reward: RewardModel | None,
    plan: _Plan,
    folder: Path,
    journal: Journal,
) -> int:
    """Sample, grade, score and count one suite; return the number of samples."""
    config = job.config
    write_rows(folder / "problems.jsonl", (problem.to_row() for problem in problems))
    write_rows(
        folder / "prompts.jsonl",
        (
            {"problem_id": prompt.id, "token_ids": list(prompt.token_ids)}
            | ({"messages": list(prompt.messages)} if prompt.messages else {})
            for prompt in prompts
        ),
    )
    sampling = Sampling(
        n=max(1, config.n),
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_tokens=config.max_tokens,
        stop=profile.stop,
        seed=job.seed,
        step=0,
    )
    draws = {
        "greedy": sampling.model_copy(
            update={"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        ),
        "samples": sampling,
    }
    if not config.n:
        del draws["samples"]
    files = {"greedy": "greedy_verdicts.jsonl", "samples": "verdicts.jsonl"}
    shards = log_folder(job.out, job.name, name, plan.generation)
    graded: dict[str, list[list[Graded]]] = {}
    for label, draw in draws.items():
        log = generate_shards(engine.spread(), prompts, draw, shards, config.shard_size, label)
        path = folder / files[label]
        if not journal.holds(path):
            rows = grade(problems, log, pool, f"grade {label}", bool(config.tool_rounds))
            write_graded(path, rows, journal)
        graded[label] = read_graded(path, [p.id for p in problems], draw.n)
    if not config.n:
        graded["samples"] = graded["greedy"]
        write_graded(folder / files["samples"], (group[0] for group in graded["greedy"]))
    for label in draws:
        for path in log_shards(shards, label):
            link(path, folder / path.name)
    scores = None
    if reward is not None:
        path = folder / "scores.jsonl"
        if not journal.holds(path):
            log = (s for file in log_shards(folder, "samples") for s in read_samples(file))
            write_rows(path, reward.rows(prompts, log), journal)
        scores = read_scores(path, {p.id: range(sampling.n) for p in problems})
    figures = suite_figures(
        problems,
        graded["samples"],
        [group[0] for group in graded["greedy"]],
        config.k,
        scores=scores,
        resamples=config.bootstrap,
        seed=job.seed,
    )
    write_json(folder / "figures.json", {"checkpoint": job.name, "suite": name, **figures})
    return len(problems) * (config.n + 1)
