r"""Methods beside each other: one SFT checkpoint, equal sample budgets, several seeds.

    python -m pipeline.study --config pipeline/configs/study.toml

The configuration is a run's with a [study] table. The data and the stage that everything starts
from are made once, with the run's own seed; then every seed of the study samples, trains and
evaluates all the other stages in a folder of its own, by the commands that a user would type.
`study.html`, `study.json` and `study.md` show what DeepSeekMath's figures 5 to 7 show: learning
curves, iterations, Maj@K and Pass@K before and after, and which of its findings held here.

Intervals are Student's t over seeds (95 %); a difference between two methods is taken within each
seed, so that what the seeds share cancels. A finding holds where its whole interval lies above 0,
fails where it lies below, and is open otherwise: few seeds leave much open, and the page says so.

Killed and started again, the study goes on where its stages stopped.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from data_prep.arguments import Arguments
from data_prep.config import Config, dump_toml, read_toml, validate
from data_prep.errors import UserError, command
from data_prep.jsonl import read_json, read_rows
from pipeline.config import RunConfig
from pipeline.interval import Interval, over_seeds
from pipeline.methods import create_method
from pipeline.run import stages_of
from pipeline.study_page import Curve, write_page
from verifiers.plain import plain


class StudyConfig(Config):
    """What is compared.

    Attributes:
        start: The stage that every other starts from; made once.
        seeds: Of sampling and training; a run each.
        jobs: Runs at a time, a thread each where there are several.
        budget: Samples every method may use; checked against the configuration.
        suite: Suite of the final figures.
        curves: Stages of the learning curves (figure 5); empty takes all policies.
        online: The stages "online" and "offline" of the first finding.
        relative: The stages with group-relative coefficients and without of the second.
        supervision: The stages with process and with outcome supervision of the third.
        iterative: The stage whose iterations are looked at (figure 6).
        reinforced: The stage of Maj@K and Pass@K before and after (figure 7).
    """

    start: str = "sft"
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    jobs: int = Field(default=2, ge=1)
    budget: int = Field(ge=1)
    suite: str = "embedded"
    curves: tuple[str, ...] = ()
    online: tuple[str, str] | None = ("online_rft", "rft")
    relative: tuple[str, str] | None = ("grpo", "online_rft")
    supervision: tuple[str, str] | None = ("grpo_process", "grpo")
    iterative: str = ""
    reinforced: str = "grpo"


class Study(Config):
    """A run's configuration and what is compared in it."""

    run: RunConfig
    study: StudyConfig

    @model_validator(mode="after")
    def _whole(self) -> Study:
        names = [stage.name for stage in self.run.train]
        asked = {self.study.start, self.study.reinforced, *self.study.curves}
        for pair in (self.study.online, self.study.relative, self.study.supervision):
            asked |= set(pair or ())
        if self.study.iterative:
            asked.add(self.study.iterative)
        if missing := sorted(asked - set(names)):
            raise ValueError(f"[study] names {missing}, and the stages are {names}")
        run = self.run
        if run.data is None or run.evaluate is None or run.generate is None:
            raise ValueError("a study needs the tables [data], [generate] and [evaluate]")
        if self.study.suite not in run.evaluate.suites:
            raise ValueError(f"study.suite {self.study.suite!r} is none of evaluate.suites")
        if len(set(self.study.seeds)) != len(self.study.seeds):
            raise ValueError("study.seeds: a seed stands there twice")
        for stage in self.run.train:
            used = _samples_of(self.run, stage.name)
            if used not in (None, self.study.budget):
                raise ValueError(
                    f"stage {stage.name!r} uses {used} samples and the budget is "
                    f"{self.study.budget}: mend steps, batch, group_size or [generate], or set "
                    "sample_budget"
                )
        return self


def _samples_of(run: RunConfig, name: str) -> int | None:
    """Return how many samples a stage may use; None where it uses none."""
    stage = next(s for s in run.train if s.name == name)
    method = create_method(stage.method)
    if method.source == "samples" and run.generate is not None:
        return run.generate.limit * run.generate.group_size
    if method.source != "policy":
        return None
    return stage.sample_budget or stage.steps * stage.batch * method.samples(stage.group_size)


def load_study(path: str | Path, out: str | None, seeds: Sequence[int]) -> Study:
    """Read and validate a study's configuration.

    Raises:
        UserError: The file is missing or broken, or a key or value is not allowed.
    """
    table = read_toml(path)
    study = dict(table.pop("study", {}))
    if out is not None:
        table["out"] = out
    if seeds:
        study["seeds"] = list(seeds)
    return validate(Study, {"run": table, "study": study}, str(path))


def base_of(study: Study) -> RunConfig:
    """Return the run that makes the data and the start."""
    run = study.run
    needed, wanted = {study.study.start}, []
    for stage in reversed(run.train):
        if stage.name in needed:
            wanted.append(stage)
            needed.add(stage.init)
    changes = {"train": tuple(reversed(wanted)), "generate": None, "out": f"{run.out}/start"}
    return run.model_copy(update=changes)


def seed_run(study: Study, seed: int) -> RunConfig:
    """Return the run of one seed: every other stage, on the same data."""
    run, start = study.run, study.study.start
    checkpoint = str(Path(base_of(study).out) / start / "checkpoint")
    made = {stage.name for stage in base_of(study).train}
    table = run.model_dump(mode="json")
    own = table["data"]["seed"]
    table |= {"seed": seed, "out": f"{run.out}/seed-{seed}", "name": f"{run.name}, seed {seed}"}
    table["data"]["seed"] = run.seed if own is None else own
    table["train"] = [s for s in table["train"] if s["name"] not in made]
    for stage in table["train"]:
        if stage["init"] == start:
            stage["init"] = checkpoint
    if table["generate"]["model"] == start:
        table["generate"]["model"] = checkpoint
    return validate(RunConfig, table, f"the run of seed {seed}")


def run_study(study: Study) -> None:
    """Run what is not complete yet.

    Raises:
        UserError: A run failed; its log says why.
    """
    _run_one(base_of(study), threads=0)
    runs = [seed_run(study, seed) for seed in study.study.seeds]
    jobs = min(study.study.jobs, len(runs))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: _run_one(run, threads=1 if jobs > 1 else 0), runs))


def _run_one(run: RunConfig, threads: int) -> None:
    """Run a configuration by `pipeline.run`, its output in `log.txt`."""
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.toml").write_text(dump_toml(run), encoding="utf-8")
    stages_of(run)
    began = time.monotonic()
    print(f"study: {out} …", file=sys.stderr, flush=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "pipeline.run", "--config", str(out / "study.toml")],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if status:
        raise UserError(
            str(out),
            f"its run ended with status {status}",
            "a complete run",
            f"see the end of {out / 'log.txt'}; the same command goes on from there",
        )
    print(f"study: {out} done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def curve_of(study: Study, seed: int, name: str) -> Curve:
    """Return a stage's learning curve; offline methods use up their log evenly."""
    path = Path(seed_run(study, seed).out) / name / "steps.jsonl"
    rows = [row for _, row in read_rows(path)]
    drawn = 0
    points = Curve([], [])
    for number, row in enumerate(rows, start=1):
        if "validation_accuracy_before" in row:
            points.samples.append(0)
            points.accuracy.append(row["validation_accuracy_before"])
        drawn += int(row.get("samples", 0))
        used = drawn or round(study.study.budget * number / len(rows))
        if row.get("validation_accuracy") is not None:
            points.samples.append(used)
            points.accuracy.append(row["validation_accuracy"])
    return points


def policies_of(study: Study) -> list[str]:
    """Return the names of the stages that train a policy, without those made once."""
    made = {stage.name for stage in base_of(study).train}
    return [
        s.name
        for s in study.run.train
        if s.name not in made and create_method(s.method).trains == "policy"
    ]


def collect(study: Study) -> dict[str, Any]:
    """Return every figure of the study, JSON-ready; what they say of the paper is in "findings"."""
    config = study.study
    seeds = config.seeds
    suite = config.suite
    before = read_json(Path(base_of(study).out) / f"eval-{config.start}" / suite / "figures.json")
    after = {
        name: [
            read_json(Path(seed_run(study, seed).out) / f"eval-{name}" / suite / "figures.json")[
                "figures"
            ]
            for seed in seeds
        ]
        for name in policies_of(study)
    }
    assert study.run.evaluate is not None  # noqa: S101 - the validator has seen to it
    ks, n = study.run.evaluate.k, study.run.evaluate.n
    metrics = ["greedy", f"avg@{n}", *(f"{m}@{k}" for m in ("maj", "pass") for k in ks)]
    curves = {
        name: [curve_of(study, seed, name)._asdict() for seed in seeds]
        for name in config.curves or tuple(after)
    }
    figures = {
        "name": study.run.name,
        "start": config.start,
        "reinforced": config.reinforced,
        "seeds": list(seeds),
        "budget": config.budget,
        "questions": before["questions"],
        "n": n,
        "k": list(ks),
        "before": {m: before["figures"][m] for m in metrics},
        "after": {
            name: {m: [row[m]["value"] for row in rows] for m in metrics}
            for name, rows in after.items()
        },
        "curves": curves,
        "iterations": _iterations(study),
    }
    return {**figures, "findings": findings(study, figures)}


def _iterations(study: Study) -> dict[str, Any]:
    """Return the solved share at the start and at the end of each outer iteration, by seed.

    Beside it the learning curves, and how many samples were used when each later one began.
    """
    name = study.study.iterative
    if not name:
        return {}
    stage = next(s for s in study.run.train if s.name == name)
    span = math.ceil(stage.steps / stage.iterations)
    ends: list[list[float]] = []
    for seed in study.study.seeds:
        path = Path(seed_run(study, seed).out) / name / "steps.jsonl"
        found: dict[int, float] = {}
        for _, row in read_rows(path):
            if "validation_accuracy_before" in row:
                found[-1] = row["validation_accuracy_before"]
            if row.get("validation_accuracy") is not None:
                found[row["step"] // span] = row["validation_accuracy"]
        ends.append([found[i] for i in sorted(found)])
    return {
        "stage": name,
        "steps": span,
        "accuracy": ends,
        "begin": [n * span * stage.batch * stage.group_size for n in range(1, stage.iterations)],
        "curves": [curve_of(study, seed, name)._asdict() for seed in study.study.seeds],
    }


def findings(study: Study, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the paper found, and whether it held here, with the difference behind it."""
    config, after = study.study, figures["after"]
    metric = f"avg@{figures['n']}"

    def between(one: str, two: str) -> Interval:
        pairs = zip(after[one][metric], after[two][metric], strict=True)
        return over_seeds([a - b for a, b in pairs])

    found: list[tuple[str, str, Interval]] = []
    for words, pair in (
        ("online sampling beats offline sampling", config.online),
        ("group-relative coefficients beat imitation of correct samples", config.relative),
        ("process supervision beats outcome supervision", config.supervision),
    ):
        if pair is not None:
            found.append((words, f"{pair[0]} − {pair[1]}, {metric}", between(*pair)))
    if figures["iterations"]:
        rows = figures["iterations"]["accuracy"]
        gains = [[*(b - a for a, b in itertools.pairwise(row))]
                 for row in rows]  # fmt: skip
        first = over_seeds([gain[0] - max(gain[1:], default=0.0) for gain in gains])
        found.append((
            "iterating helps most in the first iteration",
            f"gain of {config.iterative}'s first − largest later, solved validation problems",
            first,
        ))  # fmt: skip
    most = max(figures["k"])
    name = config.reinforced
    rise = {
        m: [
            value - figures["before"][f"{m}@{most}"]["value"]
            for value in after[name][f"{m}@{most}"]
        ]
        for m in ("maj", "pass")
    }
    found.append(
        (f"reinforcement raises Maj@{most}", f"{name} − {config.start}", over_seeds(rise["maj"]))
    )
    both = zip(rise["maj"], rise["pass"], strict=True)
    found.append((
        f"it raises Maj@{most} more than Pass@{most}",
        f"difference of the two gains of {name}",
        over_seeds([a - b for a, b in both]),
    ))  # fmt: skip
    return [
        {"finding": words, "measure": measure, "difference": list(gap), "text": gap.text(sign=True),
         "verdict": _verdict(gap)}
        for words, measure, gap in found
    ]  # fmt: skip


def _verdict(gap: Interval) -> str:
    if math.isnan(gap.low):
        return "open (one seed)"
    if gap.low > 0:
        return "held"
    return "did not hold" if gap.high < 0 else "open"


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m pipeline.study", __doc__)
    parser.add_argument("--config", required=True, help="a run's TOML with a [study] table")
    parser.add_argument("--out", help="replaces the configuration's run folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="replaces study.seeds")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    known = parser.parse_args(arguments)
    study = load_study(known.config, known.out, known.seeds)
    if known.dry_run:
        for run in (base_of(study), *(seed_run(study, seed) for seed in study.study.seeds)):
            print(f"{run.out}: {', '.join(name for name, _ in stages_of(run))}")
        return
    began = time.monotonic()
    run_study(study)
    figures = collect(study)
    page = write_page(figures, Path(study.run.out))
    print(plain((page.parent / "study.md").read_text(encoding="utf-8")))
    print(f"study: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    command(main)
