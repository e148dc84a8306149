"""Hours of the embedded GRPO loop with faults: memory flat, no sample lost or doubled, rate steady.

    python tests/benchmarks/bench_soak.py --minutes 120 --out soak.json
    python tests/benchmarks/bench_soak.py --minutes 2

What goes wrong, by itself and again and again:

    verifier   a checker that ends its process, or takes longer than its limit, on some of the texts
    engine     some prompts cannot be completed; now and then the engine fails as a whole, which
               ends the stage: it is started again and goes on from its last state
    workers    the checker is slow on some texts, within its limit

Every step's log must hold each prompt's samples once, and `steps.jsonl` each step once. Once a
warm-up of a fifth of the time is over, the memory of this process may grow by 5 % at most (what it
has allocated: pages of libraries' files, a third of what is resident, come and go as the kernel
drops and reads them; both are printed), and the rate of the steps may fall by 10 %. The rate is
taken in processor time, as other work on the machine changes that of wall time, and against a
yardstick, a fixed piece of work that a process beside this one does every few seconds: a shared
machine's processor was seen to be twice as fast in one minute as in the next. Prints JSON with
machine, versions and commit, and the rates of all three kinds; exit status 1 where one of this does
not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import itertools

import psutil
import torch

from data_prep.build import build
from data_prep.config import validate
from data_prep.jsonl import read_rows
from data_prep.versions import versions
from pipeline.config import RunConfig, TrainConfig
from pipeline.engines.embedded import EmbeddedEngine
from pipeline.train import train

ROOT = Path(__file__).resolve().parents[2]
SMALL_RUN = ROOT / "tests" / "pipeline" / "small_run.py"
BATCH, GROUP, ERRORS_EVERY, FAILS_EVERY = 4, 6, 17, 1000
LARGEST_GROWTH, LARGEST_FALL = 0.05, 0.10
CHECKER = '''
import os
import time
import zlib

from verifiers.checkers import Checker, Outcome, Verdict


class Troubled(Checker):
    """Correct for half of all texts, with no rule to it; ill at ease with some."""

    examples = (("", "ab", "correct"), ("", "b", "incorrect"))

    def check(self, gold, text):
        number = zlib.crc32(text.encode())
        draw = number % 1000
        if draw < 2:
            os._exit(3)
        if draw < 4:
            time.sleep(30.0)
        if draw < 20:
            time.sleep(0.05)
        outcome = Outcome.CORRECT if number // 1000 % 2 else Outcome.INCORRECT
        return Verdict(outcome, extracted=text, rule="troubled")
'''


YARDSTICK = """
import sys, time
import numpy
matrix = numpy.random.default_rng(0).standard_normal((96, 96)).astype(numpy.float32)
for _ in sys.stdin:
    spent = []
    for _ in range(3):
        began = time.process_time()
        seen = {}
        for number in range(60_000):
            seen[str(number % 977)] = number
        product = matrix
        for _ in range(300):
            product = numpy.tanh(product @ matrix)
        spent.append(time.process_time() - began)
    print(sorted(spent)[1], flush=True)
"""


class Yardstick:
    """A fixed piece of work, half Python and half products, in a process of its own.

    Attributes:
        process: It; a line on its input has the work done.
    """

    def __init__(self) -> None:
        one = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", YARDSTICK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=one,
        )

    def measure(self) -> float:
        """Return the seconds of processor time that the work took, the median of three."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def stop(self) -> None:
        """End."""
        self.process.communicate()


class EngineFailedError(RuntimeError):
    """Injected."""


class Faults:
    """Makes the engine fail: single prompts often, a whole call now and then.

    Attributes:
        calls: Of `generate`.
        prompts: That were given no completion.
        failures: Whole calls.
    """

    def __init__(self) -> None:
        self.calls = self.prompts = self.failures = 0
        self._generate = EmbeddedEngine.generate

    def install(self) -> None:
        """Take the engine's place."""
        faults = self

        def generate(engine: EmbeddedEngine, prompts: list, sampling: Any) -> list:
            faults.calls += 1
            if faults.calls % FAILS_EVERY == 0:
                faults.failures += 1
                raise EngineFailedError
            groups = faults._generate(engine, prompts, sampling)
            # By step, so that a step that is taken again is the same; the probes have step 0.
            if sampling.step and sampling.step % ERRORS_EVERY == 0 and len(groups) == BATCH:
                groups[1].completions, groups[1].error = [], "injected: no completion"
                faults.prompts += 1
            return groups

        EmbeddedEngine.generate = generate  # type: ignore[method-assign]


Point = tuple[float, int, int, int, float, float, int]


class Watch(threading.Thread):
    """Looks at memory and progress every so many seconds.

    Attributes:
        points: (seconds, bytes of this process, bytes of its workers, steps taken, seconds of
            this process's processor time, seconds of the yardstick, bytes of this process that
            are no file's).
    """

    def __init__(self, records: Path, every_s: float) -> None:
        super().__init__(daemon=True)
        self.records, self.every_s = records, every_s
        self.points: list[Point] = []
        self._size = self._steps = 0
        self._yardstick = Yardstick()
        self._end = threading.Event()

    def run(self) -> None:
        """Look until `stop`."""
        process, began = psutil.Process(), time.monotonic()
        while not self._end.wait(self.every_s):
            workers = 0
            for child in process.children(recursive=True):
                if child.pid == self._yardstick.process.pid:
                    continue
                try:
                    workers += child.memory_info().rss
                except psutil.Error:
                    continue  # it has just ended
            now = time.monotonic() - began
            spent = process.cpu_times()
            memory = process.memory_info()
            own = memory.rss - memory.shared
            busy = spent.user + spent.system
            steps = self._count()
            unit = self._yardstick.measure()
            self.points.append((now, memory.rss, workers, steps, busy, unit, own))

    def _count(self) -> int:
        """Return the steps on record; the file is read from where it was left."""
        if not self.records.is_file():
            return self._steps
        size = self.records.stat().st_size
        if size < self._size:
            self._size = self._steps = 0
        with self.records.open("rb") as file:
            file.seek(self._size)
            # A block at a time: the allocator keeps as much as was ever read at once, up to 32 MiB,
            # and that would be counted as the run's.
            while data := file.read(1 << 16):
                self._size, self._steps = self._size + len(data), self._steps + data.count(b"\n")
        return self._steps

    def stop(self) -> None:
        """End."""
        self._end.set()
        self.join()
        self._yardstick.stop()


def configure(folder: Path) -> tuple[RunConfig, TrainConfig]:
    """Return the run, and its GRPO stage without an end."""
    spec = importlib.util.spec_from_file_location("small_run", SMALL_RUN)
    assert spec is not None and spec.loader is not None
    small: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    run = small.small_run(folder)
    checker = folder / "troubled.py"
    checker.write_text(CHECKER, encoding="utf-8")
    verify = {"checker": {"kind": str(checker)}, "workers": 2, "time_limit_s": 0.5}
    run = validate(RunConfig, {**run.model_dump(), "verify": verify}, "soak")
    grpo = next(stage for stage in run.train if stage.name == "grpo")
    changes = {"steps": 10_000_000, "save_every": 100, "batch": BATCH, "group_size": GROUP}
    # Every group keeps its signal and its lengths, so that the last step is as much work as the
    # first: at 1e-5 the policy had solved the task after an hour.
    changes |= {"coefficients_every": 0, "optimizer": {"learning_rate": 1e-8}}
    return run, validate(TrainConfig, {**grpo.model_dump(), **changes}, "soak")


def check_samples(folder: Path) -> dict[str, int]:
    """Count what was logged: lost and doubled samples, and those nobody could judge."""
    found: Counter[str] = Counter()
    steps = [row["step"] for _, row in read_rows(folder / "steps.jsonl")]
    found["steps"] = len(steps)
    found["steps_lost_or_doubled"] = sum(a != b for a, b in enumerate(steps))
    for step in steps:
        rows = [row for _, row in read_rows(folder / "rollouts" / f"step-{step:05d}.jsonl")]
        drawn = Counter((r["group"], r["sample_index"]) for r in rows if "error" not in r)
        errors = sum("error" in row for row in rows)
        found["samples"] += sum(drawn.values())
        found["prompt_errors"] += errors
        found["doubled"] += sum(count - 1 for count in drawn.values())
        found["lost"] += (BATCH - errors) * GROUP - len(drawn)
        found.update(f"verdict_{row['outcome']}" for row in rows if "error" not in row)
    return dict(found)


def soak(folder: Path, minutes: float) -> dict[str, Any]:
    """Run, and say what was found."""
    run, config = configure(folder)
    assert run.data is not None
    build(run.data, Path(run.out), run.seed)
    train(run, run.train[0])
    faults = Faults()
    faults.install()
    work = Path(run.out) / "grpo.partial"
    watch = Watch(work / "steps.jsonl", max(0.5, 60 * minutes / 400))
    watch.start()
    # As a user would end it: the step is finished and saved.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    restarts = 0
    while True:
        try:
            train(run, config)
        except EngineFailedError:
            restarts += 1
        except KeyboardInterrupt:
            break
    watch.stop()
    points = watch.points
    tail = len(points) // 5

    def middle(part: list[Point], place: int) -> float:
        return statistics.median(point[place] for point in part)

    def rates(clock: int) -> list[float]:
        ends = points[tail::tail]
        return [(b[3] - a[3]) / (b[clock] - a[clock]) for a, b in itertools.pairwise(ends)]

    # The first fifth is the warm-up: allocator, caches, compiled kernels.
    parts = [points[n * tail : (n + 1) * tail] for n in range(1, 5)]
    yardstick = [middle(part, 5) for part in parts]
    early, late = points[tail : 2 * tail], points[-tail:]
    growth = middle(late, 6) / middle(early, 6) - 1.0
    by_cpu = rates(4)
    # Steps in the time that the yardstick takes.
    by_yardstick = [rate * unit for rate, unit in zip(by_cpu, yardstick, strict=True)]
    fall = 1.0 - by_yardstick[-1] / by_yardstick[0]
    samples = check_samples(work)
    return {
        "minutes": minutes,
        "restarts": restarts,
        "engine_failures": faults.failures,
        "own_mib_by_fifth": [round(middle(part, 6) / 2**20, 1) for part in parts],
        "rss_mib": {
            "early": round(middle(early, 1) / 2**20, 1),
            "late": round(middle(late, 1) / 2**20, 1),
            "workers_early": round(middle(early, 2) / 2**20, 1),
            "workers_late": round(middle(late, 2) / 2**20, 1),
        },
        "memory_growth": round(growth, 4),
        "steps_per_s_by_fifth": [round(rate, 3) for rate in rates(0)],
        "steps_per_cpu_s_by_fifth": [round(rate, 3) for rate in by_cpu],
        "yardstick_s_by_fifth": [round(unit, 5) for unit in yardstick],
        "steps_per_yardstick_by_fifth": [round(rate, 3) for rate in by_yardstick],
        "samples": samples,
        "holds": growth <= LARGEST_GROWTH
        and fall <= LARGEST_FALL
        and not (samples["lost"] or samples["doubled"] or samples["steps_lost_or_doubled"]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    parser.add_argument("--work", type=Path, help="folder of the run (default: a temporary one)")
    known = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "versions": versions()}
    with tempfile.TemporaryDirectory() as name:
        found = {**machine, **soak(known.work or Path(name), known.minutes)}
    text = json.dumps(found, indent=2)
    print(text)
    if known.out is not None:
        known.out.write_text(f"{text}\n", encoding="utf-8")
    raise SystemExit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
