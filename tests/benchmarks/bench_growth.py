"""How the time of a GRPO step grows with its work: samples a second in one chart, and exponents.

    python tests/benchmarks/bench_growth.py --prepare      # the model, half a minute, once
    python tests/benchmarks/bench_growth.py --chart FILE.png [--clock cpu]
    python tests/benchmarks/bench_growth.py --quick        # a small model, under a minute

A step is the pipeline's own: the embedded engine samples, the default checker judges, rollouts are
logged, the trainer updates and the engine takes the new weights. From a common base one of prompts
a step, samples a group and tokens a completion is varied by a factor of 16, the others fixed. No
completion ends before its last token, and every other sample of a group is rewarded, so that all
of them are trained on. Rounds over all points take turns, so that a quieter minute favours none.

Then the two kinds of workers, by the same work on one and more of them: processes that judge, and
Ray's workers that sample (left out where Ray is not installed).

The exponent is the slope of log(time) in log(work), of medians over rounds, with Student's 95 %
interval over the points: 1 is linear, less says that a fixed cost is shared by more. `last` is the
slope between the two largest points, where fixed costs show least and what grows faster most.

Where other work shares the machine, processor time (`--clock cpu`) says more than wall time; with
it workers must cost the same however many they are. One thread each. Prints JSON with machine,
versions and commit; a table goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
from growth_figures import AXES, draw, markdown, summary

from data_prep.versions import versions

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name = "growth"
seed = 1
out = "{out}"
[data]
profile = "embedded"
rows = {rows}
sft_validation_rows = 8
[[data.sources]]
kind = "embedded"
train = {problems}
validation = 8
test = 8
[data.tokenizer]
vocab_size = {vocabulary}
[model]
width = {width}
layers = {layers}
heads = 4
kv_heads = 4
feed_forward = {feed_forward}
context = 1024
[engine]
kind = "{engine}"
[[train]]
name = "sft"
batch = 32
steps = {steps}
save_every = 1000
method = {{ kind = "sft" }}
optimizer = {{ learning_rate = 1e-3, warmup_steps = 10 }}
[[train]]
name = "grpo"
init = "sft"
method = {{ kind = "grpo", normaliser = "token", beta = 0.0 }}
optimizer = {{ learning_rate = 1e-6, warmup_steps = 0, schedule = "constant" }}
"""
# Not the embedded engine itself: a completion has to be as long as it is asked to be.
ENDLESS = '''
"""The embedded engine with a model that never ends."""

from pipeline.engines.embedded import Config, EmbeddedEngine


def create(config: Config, model: str) -> EmbeddedEngine:
    """Return it."""
    engine = EmbeddedEngine(config, model)
    engine.end_token_ids = []
    return engine
'''


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        model: Its shape, its data, and the steps that train it first.
        base: The common point.
        values: Of each axis.
        rounds: Over all points, after one that warms up.
        verifiers: Numbers of judging processes.
        samplers: Numbers of Ray workers.
        judged: Answers that these processes judge.
        parts: Parts of `base` prompts that these workers sample.
    """

    model: dict[str, int]
    base: dict[str, int]
    values: dict[str, tuple[int, ...]]
    rounds: int
    verifiers: tuple[int, ...]
    samplers: tuple[int, ...]
    judged: int
    parts: int


WHOLE = Plan(
    {
        "width": 128,
        "layers": 4,
        "feed_forward": 384,
        "vocabulary": 512,
        "rows": 4096,
        "problems": 2000,
        "steps": 100,
    },
    {"prompts": 8, "group": 8, "length": 64},
    {
        "prompts": (2, 4, 8, 16, 32),
        "group": (2, 4, 8, 16, 32),
        "length": (16, 32, 64, 128, 256),
    },
    rounds=6,
    verifiers=(1, 2),
    samplers=(1, 2),
    judged=20_000,
    parts=8,
)
QUICK = Plan(
    {
        "width": 32,
        "layers": 2,
        "feed_forward": 48,
        "vocabulary": 320,
        "rows": 64,
        "problems": 40,
        "steps": 2,
    },
    {"prompts": 4, "group": 4, "length": 8},
    {"prompts": (2, 4, 8), "group": (2, 4, 8), "length": (4, 8, 16)},
    rounds=1,
    verifiers=(1, 2),
    samplers=(),
    judged=200,
    parts=2,
)


def prepare(folder: Path, plan: Plan) -> Any:
    """Make data and the model to start from, once; return the run."""
    from data_prep.build import main as build
    from pipeline.config import load_run
    from pipeline.train import train

    folder.mkdir(parents=True, exist_ok=True)
    engine = folder / "endless.py"
    engine.write_text(ENDLESS, encoding="utf-8")
    path = folder / "run.toml"
    text = CONFIG.format(out=folder / "run", engine=engine, **plan.model)
    path.write_text(text, encoding="utf-8")
    run = load_run(path)
    if not (Path(run.out) / "sft" / "checkpoint").is_dir():
        with contextlib.redirect_stdout(sys.stderr):
            build(["--config", str(path)])
        train(run, run.train[0])
    return run


class Clock:
    """Wall and processor time since it was made, this process's and its children's."""

    def __init__(self) -> None:
        """Begin."""
        self._process = psutil.Process()
        self._wall, self._cpu = time.perf_counter(), self._used()

    def _used(self) -> float:
        total = time.process_time()
        for child in self._process.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:
                continue  # it has just ended
            total += times.user + times.system
        return total

    def read(self) -> dict[str, float]:
        """Return seconds of both."""
        return {"wall": time.perf_counter() - self._wall, "cpu": self._used() - self._cpu}


class Timed:
    """An engine or a pool whose one call is timed."""

    def __init__(self, what: Any, name: str) -> None:
        """Keep what is called."""
        self._what, self._name = what, name
        self.took: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        """Return the method, timed where it is the one."""
        found = getattr(self._what, name)
        if name != self._name:
            return found

        def timed(*arguments: Any) -> Any:
            clock = Clock()
            result = found(*arguments)
            self.took = clock.read()
            return result

        return timed


class Pipeline:
    """What takes GRPO steps of any size, with the pipeline's own parts.

    Args:
        run: Prepared.
        folder: For the logs of rollouts.
    """

    def __init__(self, run: Any, folder: Path) -> None:
        """Load model, engine and judges."""
        from data_prep.schema import read_problems
        from pipeline.engines import create_engine
        from pipeline.generate import render_prompts
        from pipeline.methods import create_method
        from pipeline.model import load_tokenizer
        from pipeline.reward import RewardConfig, RewardMaker
        from pipeline.trainer import build_trainer
        from pipeline.verify import open_pool

        self.run, self.folder, self.config = run, folder, run.train[1]
        self.checkpoint = Path(run.out) / "sft" / "checkpoint"
        tokenizer: Any = load_tokenizer(self.checkpoint)
        self.method = create_method(self.config.method)
        self.trainer = build_trainer(run, self.config, self.method, self.checkpoint, tokenizer)
        self.engine = Timed(create_engine(run.engine, self.checkpoint), "generate")
        self.problems = list(read_problems(Path(run.out) / "data" / "train.jsonl"))
        self.prompts = render_prompts(self.problems, tokenizer, run.profile)
        self.rewards = RewardMaker(RewardConfig(), tokenizer.decode)
        verify = run.verify
        self.open_pool = partial(open_pool, verify.checker, time_limit_s=verify.time_limit_s)
        pool = self.open_pool(workers=1)
        pool.start()
        self.pool = Timed(pool, "verify_many")
        # (gold, text) of everything that was sampled.
        self.answers: list[tuple[str, str]] = []
        self.steps = 0

    def sampling(self, group: int, length: int) -> Any:
        """Return how a point samples."""
        sampling = self.run.sampling.of_run(n=group, seed=self.run.seed)
        return sampling.model_copy(update={"max_tokens": length})

    def step(self, prompts: int, group: int, length: int) -> dict[str, Any]:
        """Take a step; return its samples, tokens and the seconds of its pieces."""
        from pipeline.rollout import Rollouts

        engine: Any = self.engine
        rollouts = Rollouts(
            self.problems,
            self.prompts,
            engine,
            self.pool,  # type: ignore[arg-type]
            self.rewards,
            self.method,
            self.sampling(group, length),
            prompts,
            self.folder,
        )
        clock = Clock()
        drawn = rollouts.draw(self.steps)
        for sequence in drawn.chosen:
            sequence.reward = float(sequence.sample_index % 2)
        kept = self.method.advantages(drawn.chosen)
        update = Clock()
        self.trainer.update(kept, self.steps, 1_000_000)
        took = update.read()
        engine.load_weights(self.trainer.weights(), self.steps + 1)
        whole = clock.read()
        self.steps += 1
        if len(kept) != prompts * group or {len(s.completion) for s in kept} != {length}:
            raise RuntimeError(f"{len(kept)} samples of {prompts} x {group} x {length} tokens")
        golds = {problem.id: problem.answer for problem in self.problems}
        self.answers += [(golds[s.problem_id], s.text) for s in kept]
        return {
            "samples": len(kept),
            "tokens": sum(len(s.completion) for s in kept),
            "step": whole,
            "generate": engine.took,
            "judge": self.pool.took,
            "update": took,
        }

    def close(self) -> None:
        """End the judges and the engine."""
        self.pool.close()
        self.engine.close()


def points_of(plan: Plan) -> list[tuple[str, int, dict[str, int]]]:
    """Return (axis, value, the whole point) of everything a round visits; the base once an axis."""
    return [
        (axis, value, {**plan.base, axis: value}) for axis in AXES for value in plan.values[axis]
    ]


def measure_steps(pipeline: Pipeline, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return an axis's points in order, each with its rounds."""
    points = points_of(plan)
    found: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
    rows = [{"value": value, "rounds": []} for _, value, _ in points]
    for turn in range(plan.rounds + 1):
        # There and back, so that a drift of the machine's speed favours no end.
        order = range(len(points)) if turn % 2 else reversed(range(len(points)))
        for index in order:
            row = pipeline.step(**points[index][2])
            if turn:  # the first turn compiles products and fills caches
                rows[index]["rounds"].append(row)
            print(".", end="", file=sys.stderr, flush=True)
    for (axis, _, _), row in zip(points, rows, strict=True):
        found[axis].append(row)
    print(file=sys.stderr)
    return found


def measure_verifiers(pipeline: Pipeline, plan: Plan) -> list[dict[str, Any]]:
    """Return the time in which so many processes judge the same answers."""
    times = -(-plan.judged // len(pipeline.answers))
    answers = (pipeline.answers * times)[: plan.judged]
    pools = {count: pipeline.open_pool(workers=count) for count in plan.verifiers}
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in pools}
    try:
        for pool in pools.values():
            pool.start()
        for turn in range(plan.rounds + 1):
            for count, pool in pools.items():
                clock = Clock()
                pool.verify_many(answers)
                row = {"samples": len(answers), "judge": clock.read()}
                if turn:
                    found[count].append(row)
    finally:
        for pool in pools.values():
            pool.close()
    return [{"value": count, "rounds": rows} for count, rows in found.items()]


def measure_samplers(pipeline: Pipeline, plan: Plan) -> list[dict[str, Any]]:
    """Return the time in which so many of Ray's workers complete the same prompts."""
    from data_prep.cluster import ClusterConfig
    from pipeline.cluster import ClusterEngine
    from pipeline.engines import create_engine

    size, count = plan.base["prompts"], plan.parts
    parts = [pipeline.prompts[i * size : (i + 1) * size] for i in range(count)]
    sampling = pipeline.sampling(plan.base["group"], plan.base["length"])
    make = partial(create_engine, pipeline.run.engine, pipeline.checkpoint)
    rows = []
    for workers in plan.samplers:
        engine = ClusterEngine(ClusterConfig(workers=workers), make)
        try:
            list(engine.drawn(parts, sampling))
            rounds = []
            for _ in range(plan.rounds):
                clock = Clock()
                groups = dict(engine.drawn(parts, sampling))
                samples = sum(len(g.completions) for part in groups.values() for g in part)
                rounds.append({"samples": samples, "generate": clock.read()})
        finally:
            engine.close()
        rows.append({"value": workers, "rounds": rounds})
    return rows


def measure(folder: Path, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the steps' points and the workers'."""
    run = prepare(folder, plan)
    with tempfile.TemporaryDirectory() as logs:
        pipeline = Pipeline(run, Path(logs))
        try:
            steps = measure_steps(pipeline, plan)
            workers = {"verifiers": measure_verifiers(pipeline, plan)}
            if plan.samplers and importlib.util.find_spec("ray") is not None:
                workers["samplers"] = measure_samplers(pipeline, plan)
        finally:
            pipeline.close()
    return steps, workers


def rounded(value: Any) -> Any:
    """Return a JSON value with five digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, few points, no Ray")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, help=f"default {WHOLE.rounds}")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_growth")
    parser.add_argument("--prepare", action="store_true", help="train the model and stop")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    parser.add_argument("--chart", type=Path, help="write the chart there, as PNG")
    parser.add_argument("--redraw", type=Path, help="chart and table of a JSON; measure nothing")
    known = parser.parse_args(arguments)
    plan = QUICK if known.quick else WHOLE
    if known.rounds:
        plan = Plan(**{**vars(plan), "rounds": known.rounds})
    torch.set_num_threads(1)
    work = known.work.resolve() / ("quick" if known.quick else "whole")
    if known.prepare:
        prepare(work, plan)
        return
    began = time.perf_counter()
    if known.redraw:
        report = json.loads(known.redraw.read_text(encoding="utf-8"))
    else:
        steps, workers = measure(work, plan)
        found = {
            "machine": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "versions": versions(),
            "base": plan.base,
            "model": plan.model,
            "rounds": plan.rounds,
            **{clock: summary(steps, workers, clock) for clock in ("wall", "cpu")},
            "points": {**steps, **workers},
            "seconds": time.perf_counter() - began,
        }
        report = rounded(found)
    if known.chart is not None:
        canvas: Any = draw(report[known.clock], report["base"], known.clock)
        known.chart.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(known.chart, dpi=110, metadata={"Software": None})
    text = json.dumps(report, indent=2)
    if known.out is not None:
        known.out.write_text(f"{text}\n", encoding="utf-8")
    print(text)
    print(markdown(report[known.clock], known.clock), file=sys.stderr)


if __name__ == "__main__":
    main()
