"""A whole embedded run that is killed, or whose disk is full, again and again.

    python tests/integration/fault_run.py --out DIR --seed 1 kill=50 fill=20 damage=0

Everything is imported once; each attempt is a forked child that runs `pipeline.run` with its
stages in its own process. First one runs that nothing disturbs. Then, for each NAME=TIMES:

    kill     SIGKILL in every stage in turn: before the n-th call that changes the run folder (an
             audit hook counts them, from outside), torn, with half of what the n-th call had to
             write in the file, or at a moment
    stop     SIGTERM or SIGINT in the midst of each stage: it has to end whole, with status 130
    fill     a disk that is full, and grows (a tmpfs; root)
    refuse   a folder that must not be written to (a tmpfs that is mounted read-only; root)
    limit    a limit on the size of a file, which rises
    memory   allocations that fail
    damage   a file of a complete or an interrupted run is cut off, changed or removed; 0 for every
             kind of file and of damage
    workers  TIMES worker processes, and no fault at all

What ends a run for want of room or of memory has to end it with status 2 and a message that names
a file and says what to do. After each of these the run goes on to its end, and is compared, byte
for byte, with the one that nothing disturbed. Every fault is told on standard error as it happens;
JSON on the last line of the output says what was found. `--part 0/2` and `--part 1/2` share the
kinds of damage between two processes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child must find no threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CONFIG = """
name = "faults"
seed = {seed}
out = "{out}"

[mixture]
profile = "embedded"
max_length = 96
packing = "none"
validation_rows = 6
near_duplicates = 0.0
chunk_rows = 12
shard_sequences = 8
workers = 1
tokenizer = {{ vocab_size = 320 }}
sources = [{{ source = {{ kind = "gsm8k", train = "{rows}" }} }}]

[data]
profile = "embedded"
rows = 8
sft_validation_rows = 4
workers = 1

[[data.sources]]
kind = "embedded"
train = 24
validation = 6
test = 4
families = {{ expression = 1.0 }}

[model]
width = 16
layers = 1
heads = 2
kv_heads = 1
feed_forward = 16
context = 96

[sampling]
max_tokens = 12

[[train]]
name = "sft"
batch = 4
steps = 5
save_every = 2
validate_every = 2
method = {{ kind = "sft" }}
optimizer = {{ learning_rate = 5e-3, warmup_steps = 2 }}

[generate]
limit = 6
group_size = 3
shard_size = 2

[verify]
checker = {{ kind = "{checker}" }}
workers = 1

[[train]]
name = "rft"
init = "sft"
batch = 2
steps = 3
save_every = 1
method = {{ kind = "rft" }}

[[train]]
name = "dpo"
init = "sft"
batch = 2
steps = 3
save_every = 2
method = {{ kind = "dpo" }}

[[train]]
name = "grpo"
init = "sft"
batch = 2
group_size = 3
steps = 4
save_every = 1
staleness = 1
correction = {{ kind = "token" }}
method = {{ kind = "grpo", updates = 2, beta = 0.05 }}

[[train]]
name = "ppo"
init = "sft"
batch = 2
group_size = 3
steps = 4
save_every = 2
iterations = 2
method = {{ kind = "ppo", critic = "separate", beta = 0.05 }}

[evaluate]
n = 2
k = [1, 2]
max_tokens = 12
shard_size = 2
bootstrap = 100
workers = 1
"""

# A model of five steps solves nothing; this verifier gives both verdicts.
CHECKER = '''
from verifiers.checkers import Checker, Outcome, Verdict


class EvenLength(Checker):
    """Correct where the completion has an even number of characters."""

    examples = (("", "ab", "correct"), ("", "a", "incorrect"))

    def check(self, gold, text):
        outcome = Outcome.INCORRECT if len(text) % 2 else Outcome.CORRECT
        return Verdict(outcome, extracted=text, rule="even_length")
'''
# Differs between two equal runs: times, and the notes about shards that were drawn again.
VOLATILE = ("timing.json", "timing.jsonl", "written.jsonl")
WRITES = os.O_WRONLY | os.O_RDWR
SLOWEST_S = 300.0


def write_config(folder: Path, out: Path, seed: int = 1) -> Path:
    """Write configuration, verifier and training rows; return the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    checker, rows = folder / "even_length.py", folder / "rows.jsonl"
    checker.write_text(CHECKER, encoding="utf-8")
    found = []
    for number in range(40):
        a, b = number % 7 + 2, number % 11 + 3
        answer = f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
        found.append({"question": f"Compute {a}+{b}, number {number}.", "answer": answer})
    rows.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    path = folder / "faults.toml"
    text = CONFIG.format(seed=seed, out=out, checker=checker, rows=rows)
    path.write_text(text, encoding="utf-8")
    return path


class Reaper:
    """Counts what changes the run folder, and kills (or stops) this process in the midst of it.

    Args:
        root: The run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = f"{root}{os.sep}"
        self.seen, self.at, self.is_torn = 0, 0, False
        self.signal = signal.SIGKILL
        self.victim: tuple[str, int] | None = None

    def install(self) -> None:
        """Look at every call from here on; there is no way back."""
        sys.addaudithook(self._hook)
        os.fsync = self._fsync  # raises no audit event

    def arm(self, at: int, kind: str) -> None:
        """Strike at the `at`-th change from now, from 1."""
        self.seen, self.at, self.is_torn = 0, at, kind == "torn"
        self.signal = getattr(signal, kind, signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and isinstance(flags, int) and flags & WRITES:
                self._change(os.fspath(path), is_write=True)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            self._change(os.fspath(arguments[1 if event == "os.rename" else 0]))
        elif event == "shutil.rmtree":
            self._change(os.fspath(arguments[0]))

    _plain_fsync = staticmethod(os.fsync)

    def _fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._change(path, is_write=os.path.isfile(path))
        self._plain_fsync(descriptor)

    def _change(self, path: str | bytes, is_write: bool = False) -> None:
        path = os.fsdecode(path)
        # Within `shutil.rmtree` names are relative to a folder's descriptor.
        if os.path.isabs(path) and not path.startswith(self.root):
            return
        self.seen += 1
        if self.victim is not None:
            victim, before = self.victim
            if os.path.isfile(victim):
                size = os.path.getsize(victim)
                os.truncate(victim, before + max(0, size - before) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at and self.seen == self.at:
            if not self.is_torn:
                os.kill(os.getpid(), self.signal)
                return
            name = path if is_write else ""
            self.victim = (name, os.path.getsize(name) if os.path.isfile(name) else 0)


def run_here(config: Path, reaper: Reaper | None, plan: dict[str, Any], tell: Callable) -> int:
    """Run all stages in this process, as `pipeline.run` orders them; return the exit status."""
    from data_prep.errors import command
    from pipeline import run as run_module

    def call(words: list[str]) -> int:
        # [python, -m, module, arguments…]
        module, arguments = words[2], words[3:]
        staged = "--stage" in arguments
        name = arguments[arguments.index("--stage") + 1] if staged else module
        if reaper is not None and name == plan.get("stage"):
            reaper.arm(plan.get("at", 0), plan["kind"])
        tell(stage=name, seen=0 if reaper is None else reaper.seen)
        loaded = importlib.import_module(module)
        sys.argv = [str(loaded.__file__), *arguments]
        try:
            command(loaded.main)
        except SystemExit as end:
            return int(end.code or 0)

    run_module._call = call
    sys.argv = ["pipeline.run", "--config", str(config), "--no-forecast"]
    try:
        command(run_module.main)
    except SystemExit as end:
        return int(end.code or 0)


class Attempt:
    """One forked child that runs the pipeline.

    Args:
        config: The run's.
        log: Takes what it prints.
        plan: Where it is killed: `kind`, `stage`, `at` (a count) or `share` (of `seconds`).
        before: Called in the child, before it begins.
        at: Called here when the plan's stage begins, while the child waits.
    """

    def __init__(
        self,
        config: Path,
        log: Path,
        plan: dict[str, Any] | None = None,
        before: Callable[[], None] | None = None,
        at: Callable[[], None] | None = None,
    ) -> None:
        self.plan, self.at = plan or {}, at
        self.stages: list[dict[str, Any]] = []
        self.log = log
        reading, writing = os.pipe()
        # What is printed goes through another process, which no limit of the child's holds for.
        with log.open("wb") as file:
            self._sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        assert self._sink.stdin is not None
        self.pid = os.fork()
        if not self.pid:
            os.close(reading)
            status = 1
            try:
                os.setsid()
                # A background job of a shell has it ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.dup2(self._sink.stdin.fileno(), 1)
                os.dup2(self._sink.stdin.fileno(), 2)
                self._sink.stdin.close()

                def tell(**message: Any) -> None:
                    line = json.dumps(message | {"time": time.monotonic()})
                    os.write(writing, f"{line}\n".encode())
                    if at is not None and message["stage"] == self.plan["stage"]:
                        os.kill(os.getpid(), signal.SIGSTOP)

                import tomllib

                reaper = Reaper(Path(tomllib.loads(config.read_text())["out"]))
                reaper.install()
                if before is not None:
                    before()
                status = run_here(config, reaper, self.plan, tell)
                if not status:
                    tell(stage="", seen=reaper.seen)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)
        self._sink.stdin.close()
        self._pipe = reading

    def finish(self) -> int:
        """Wait, and kill where the plan says so by time; return the status, -9 for a kill."""
        buffer, kill_at = b"", float("inf")
        deadline = time.monotonic() + SLOWEST_S
        while True:
            now = time.monotonic()
            if now > min(kill_at, deadline):
                os.kill(self.pid, signal.SIGKILL)
                kill_at = float("inf")
            wait = max(0.0, min(kill_at, deadline) - now)
            if not select.select([self._pipe], [], [], wait)[0]:
                continue
            data = os.read(self._pipe, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                self.stages.append(message)
                here = message["stage"] == self.plan.get("stage")
                if here and self.at is not None:
                    os.waitpid(self.pid, os.WUNTRACED)
                    self.at()
                    os.kill(self.pid, signal.SIGCONT)
                if here and self.plan["kind"] == "moment":
                    kill_at = time.monotonic() + self.plan["share"] * self.plan["seconds"]
        os.close(self._pipe)
        _, status = os.waitpid(self.pid, 0)
        self._sink.wait()
        return os.waitstatus_to_exitcode(status)

    @property
    def where(self) -> str:
        """The stage that it was in when it ended."""
        return self.stages[-1]["stage"] if self.stages else "start"

    @property
    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file whose bytes must be equal in two equal runs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in VOLATILE or path.suffix == ".lock":
            continue
        data = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(data)
            changing = ("seconds", "seal", "beside")
            manifest = {k: v for k, v in manifest.items() if k not in changing}
            data = json.dumps(manifest).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def differences(one: dict[str, str], two: dict[str, str]) -> list[str]:
    """Return the files that are not the same in two runs."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


class Disk:
    """A small file system of its own, in memory; a plain folder where nothing can be mounted.

    Args:
        place: Where it is mounted.

    Attributes:
        why_not: Why nothing is mounted; empty where it is.
    """

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        place.mkdir(parents=True, exist_ok=True)
        done = self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.place))
        self.why_not = done.stderr.strip() if done.returncode else ""

    def change(self, options: str) -> None:
        """Mount it again with other options."""
        done = self._mount("-o", f"remount,{options}", str(self.place))
        if done.returncode:
            raise SystemExit(f"remount {options}: {done.stderr}")

    def _mount(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)

    def close(self) -> None:
        """Take it away."""
        if not self.why_not:
            subprocess.run(["umount", str(self.place)], check=True)


class Trial:
    """A run that was not disturbed, and what others are compared with.

    Args:
        folder: Everything goes here; the run itself to a small disk in it, where there is one.
        seed: Of the run, and of every choice.
        part: (i, n): which of n shares of the kinds of damage are looked at.
    """

    def __init__(self, folder: Path, seed: int, part: tuple[int, int] = (0, 1)) -> None:
        self.folder, self.seed, self.part = folder.resolve(), seed, part
        self.folder.mkdir(parents=True, exist_ok=True)
        self.disk = Disk(self.folder / "disk")
        self.out, self.whole = self.disk.place / "run", self.folder / "whole"
        self.config = write_config(self.folder, self.out, seed)
        began = time.monotonic()
        attempt = Attempt(self.config, self.folder / "whole.log")
        status = attempt.finish()
        if status:
            raise SystemExit(f"the undisturbed run ended with {status}:\n{attempt.said[-4000:]}")
        self.seconds = time.monotonic() - began
        self.expected = contents(self.out)
        self.sizes = [p.stat().st_size for p in self.out.rglob("*") if p.is_file()]
        self.stages: dict[str, dict[str, float]] = {}
        for this, after in zip(attempt.stages, attempt.stages[1:], strict=False):
            self.stages[this["stage"]] = {
                "events": after["seen"] - this["seen"],
                "seconds": after["time"] - this["time"],
            }
        copy(self.out, self.whole)
        self.clear()
        self.tell(undisturbed_s=round(self.seconds, 1), files=len(self.expected))

    def tell(self, **found: Any) -> None:
        """Say what has just happened, for those who watch."""
        line = json.dumps({"at": time.strftime("%H:%M:%S", time.gmtime()), **found})
        print(line, file=sys.stderr, flush=True)

    def rng(self) -> random.Random:
        """Return random numbers, the same for each fault whatever came before."""
        return random.Random(self.seed)

    def clear(self) -> None:
        """Empty the run folder."""
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def attempt(self, number: int, **options: Any) -> Attempt:
        """Start the next attempt."""
        return Attempt(self.config, self.folder / f"attempt-{number:03d}.log", **options)

    def complete(self) -> None:
        """Let the run go on to its end."""
        last = self.attempt(999)
        if status := last.finish():
            raise SystemExit(f"the last run ended with {status}\n{last.said[-4000:]}")

    def result(self, **found: Any) -> dict[str, Any]:
        """Compare what is left with what was expected, and clear up."""
        wrong = differences(self.expected, contents(self.out))
        self.tell(compared=len(self.expected), differences=wrong)
        self.clear()
        return {"files": len(self.expected), "differences": wrong, **found}


def kill(trial: Trial, times: int) -> dict[str, Any]:
    """Kill a run `times` times, in every stage in turn, resuming each time."""
    rng = trial.rng()
    names = list(trial.stages)
    # As many in each stage as there is room for; which stages get one more is drawn.
    extra = set(rng.sample(names, times % len(names)))
    kills: list[dict[str, Any]] = []

    def strike(name: str, within: float) -> None:
        known = trial.stages[name]
        plan = {
            "kind": rng.choice(("before", "torn", "moment")),
            "stage": name,
            "at": rng.randint(1, max(1, int(known["events"] * within))),
            "share": round(rng.random() * within, 3),
            "seconds": round(known["seconds"], 3),
        }
        attempt = trial.attempt(len(kills), plan=plan)
        status = attempt.finish()
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"{plan}: status {status}\n{attempt.said[-4000:]}")
        if status:
            kills.append({**plan, "in": attempt.where})
            trial.tell(kill=len(kills), kind=plan["kind"], **{"in": attempt.where})

    for name in names:
        count = times // len(names) + (name in extra)
        for left in range(count, 0, -1):
            # A stage goes on from where it was; the last kill may fall anywhere in it.
            strike(name, 1.0 if left == 1 else 1.0 / count)
    while len(kills) < times:
        strike(names[-1], 1.0)
    trial.complete()
    return trial.result(kills=kills)


def stop(trial: Trial, times: int) -> dict[str, Any]:
    """Send SIGTERM or SIGINT in the midst of each stage: it ends whole, and says how to go on."""
    rng = trial.rng()
    ended = []
    for number, name in enumerate(list(trial.stages)[:times]):
        events = trial.stages[name]["events"]
        first = min(15, int(0.3 * events))  # past the beginning, where nothing is made yet
        plan = {
            "kind": ("SIGTERM", "SIGINT")[number % 2],
            "stage": name,
            "at": rng.randint(first, max(first, int(0.6 * events))),
        }
        attempt = trial.attempt(number, plan=plan)
        status = attempt.finish()
        said = attempt.said
        if status != 130 or "Traceback" in said or "go on with: python " not in said:
            raise SystemExit(f"{plan}: status {status}\n{said[-4000:]}")
        here = attempt.where
        found = {**plan, "in": here, "held": "stopping when this" in said}
        records = trial.out / f"{here}.partial" / "steps.jsonl"
        if records.is_file():
            # No step that was taken is taken again.
            states = sorted(p.name for p in (records.parent / "state").glob("step-*"))
            found["steps"] = len(records.read_bytes().splitlines())
            found["saved"] = int(states[-1].removeprefix("step-")) if states else 0
        ended.append(found)
        trial.tell(stop=plan["kind"], **{"in": here})
    trial.complete()
    return trial.result(ended=ended)


def workers(trial: Trial, times: int) -> dict[str, Any]:
    """Run with more workers in all stages that have some; nothing may depend on it."""
    whole = json.loads((trial.whole / "report" / "report.json").read_text("utf-8"))
    text = trial.config.read_text(encoding="utf-8")
    # The mixture's have a test of their own: they are started anew, which takes its time.
    mixture, data, rest = text.partition("[data]")
    changed = rest.replace("\nworkers = 1", f"\nworkers = {times}")
    trial.config.write_text(mixture + data + changed, encoding="utf-8")
    trial.complete()
    trial.config.write_text(text, encoding="utf-8")
    report = json.loads((trial.out / "report" / "report.json").read_text("utf-8"))
    found = trial.result(fingerprints=[whole["fingerprint"], report["fingerprint"]])
    # Cards and the page show the configuration.
    shows = ("README.md", "config.toml", "report.html", "manifest.json")
    wrong = [name for name in found["differences"] if not name.endswith(shows)]
    return {**found, "differences": wrong}


def damage(trial: Trial, times: int) -> dict[str, Any]:
    """Cut, change or remove a file of a complete or an interrupted run; nothing may be lost.

    Each kind of file has its turn with each kind of damage; `times` of these, drawn, or all (0).
    """
    rng = trial.rng()
    snapshots = {"complete": trial.whole}
    for name, known in trial.stages.items():
        # Late enough that the stage has left something to go on from.
        plan = {"kind": "before", "stage": name, "at": max(1, int(0.7 * known["events"]))}
        trial.attempt(900, plan=plan).finish()
        if any(trial.out.glob("*.partial")):
            snapshots[name] = trial.folder / f"at-{name}"
            copy(trial.out, snapshots[name])
        trial.clear()
    kinds: dict[str, list[tuple[str, Path]]] = {}
    for name, snapshot in snapshots.items():
        for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
            within = path.relative_to(snapshot)
            going = ".partial" in within.parts[0] or within.parts[0] == "samples"
            if path.suffix != ".lock" and path.stat().st_size and (name == "complete" or going):
                kind = re.sub(r"\b(sft|rft|dpo|grpo|ppo)\b", "STAGE", str(within))
                kind = re.sub(r"[0-9a-f]{16}|\d+", "N", kind)
                kinds.setdefault(kind, []).append((name, within))
    cases = [
        (*rng.choice(places), kind, how)
        for kind, places in kinds.items()
        for how in ("cut", "flip", "remove")
    ]
    first, step = trial.part
    chosen = (cases if not times else rng.sample(cases, times))[first::step]
    found = []
    for name, within, kind, how in chosen:
        copy(snapshots[name], trial.out)
        path = trial.out / within
        spoil(path, how, rng)
        attempt = trial.attempt(0)
        status = attempt.finish()
        outcome, said = "refused", attempt.said
        if status:
            error = message_of(attempt, status)
            # A shard of a sample log has a second name in the evaluation.
            if path.name not in error:
                raise SystemExit(f"{within} {how}: not named:\n{said[-4000:]}")
            again = re.search(r"what to do: remove (\S+)", said)
            if again is None:
                raise SystemExit(f"{within} {how}: nothing to do about it:\n{said[-4000:]}")
            shutil.rmtree(again.group(1))
            attempt = trial.attempt(1)
            status = attempt.finish()
        else:
            outcome = "repaired" if within.name in said else "made again"
        wrong = differences(trial.expected, contents(trial.out))
        if status or wrong:
            raise SystemExit(f"{name}: {within} {how}: {status}, {wrong}:\n{attempt.said[-4000:]}")
        found.append({"run": name, "kind": kind, "how": how, "outcome": outcome})
        trial.tell(damage=f"{len(found)}/{len(chosen)}", **found[-1])
        trial.clear()
    return {"differences": [], "cases": len(chosen), "found": found}


def copy(source: Path, target: Path) -> None:
    """Copy a run folder; files of two names stay one file."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)


def spoil(path: Path, how: str, rng: random.Random) -> None:
    """Cut a file off, change one bit of it, or remove it."""
    size = path.stat().st_size
    if how == "remove":
        path.unlink()
    elif how == "cut":
        os.truncate(path, rng.randrange(size))
    else:
        with path.open("r+b") as file:
            place = rng.randrange(size)
            file.seek(place)
            byte = file.read(1)[0] ^ (1 << rng.randrange(8))
            file.seek(place)
            file.write(bytes([byte]))


def message_of(attempt: Attempt, status: int, *expected: str) -> str:
    """Return the error that an attempt ended with; end here where it is no message for a user."""
    lines = attempt.said.splitlines()
    error = next((line for line in lines if line.startswith("error: ")), "")
    said = attempt.said
    if status != 2 or not error or "Traceback" in said or "what to do:" not in said:
        raise SystemExit(f"status {status}, no message for a user:\n{said[-4000:]}")
    for word in expected:
        if word not in error:
            raise SystemExit(f"no {word!r} in {error!r}:\n{said[-4000:]}")
    return error


def grow(
    trial: Trial, times: int, widen: Callable[[int], Callable[[], None] | None], *expected: str
) -> list[dict[str, str]]:
    """Let a run end for want of room, give it more, and so on; return where it ended.

    Args:
        trial: The run.
        times: How often room is given; then there is enough.
        widen: Gives room for the n-th time, from 0; returns what the child does first.
        expected: What each message names.
    """
    ended = []
    for number in range(times):
        before = widen(number)
        attempt = trial.attempt(number, before=before)
        status = attempt.finish()
        if not status:
            break
        error = message_of(attempt, status, *expected)
        ended.append({"in": attempt.where, "error": error.replace(str(trial.out), "RUN")})
        trial.tell(**ended[-1])
    widen(-1)
    trial.complete()
    return ended


def fill(trial: Trial, times: int) -> dict[str, Any]:
    """Run on a disk that is full again and again, each time at another moment."""
    # Whole pages are what a tmpfs counts; folders cost nothing.
    pages = sum(-(-size // 4096) for size in trial.sizes)
    rng = trial.rng()
    steps = sorted(rng.randint(2, int(1.1 * pages)) for _ in range(times))

    def widen(number: int) -> None:
        trial.disk.change("size=64m" if number < 0 else f"size={4 * steps[number]}k")

    ended = grow(trial, times, widen, str(trial.out), "No space left")
    return trial.result(ended=ended)


def limit(trial: Trial, times: int) -> dict[str, Any]:
    """Run under a limit on the size of a file that rises from time to time."""
    # Just below the size of some file, so that each has its turn at being cut off; the run's
    # configuration is the first one that is written.
    first = (trial.whole / "config.toml").stat().st_size
    sizes = [first, *sorted(size for size in set(trial.sizes) if size > first)]
    chosen = [sizes[round(n * (len(sizes) - 1) / max(1, times - 1))] for n in range(times)]

    def widen(number: int) -> Callable[[], None] | None:
        if number < 0:
            return None
        most = max(1, chosen[number] - 1)
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    return trial.result(ended=grow(trial, times, widen, str(trial.out), "File too large"))


def refuse(trial: Trial, times: int) -> dict[str, Any]:
    """Take away the right to write when some stages begin."""
    ended = []
    names = list(trial.stages)
    for number, name in enumerate(sorted(trial.rng().sample(names, times), key=names.index)):
        plan = {"kind": "read-only", "stage": name}
        attempt = trial.attempt(number, plan=plan, at=lambda: trial.disk.change("ro"))
        status = attempt.finish()
        trial.disk.change("rw")
        error = message_of(attempt, status, str(trial.out), "Read-only file system")
        ended.append({"in": attempt.where, "error": error.replace(str(trial.out), "RUN")})
        trial.tell(**ended[-1])
    trial.complete()
    return trial.result(ended=ended)


def memory(trial: Trial, times: int) -> dict[str, Any]:
    """Let allocations fail, as torch and Python say it, in training, sampling and grading."""

    def fails(module: str, owner: str, method: str, call: int, how: Callable[[], Any]) -> Any:
        def install() -> None:
            holder: Any = getattr(importlib.import_module(module), owner)
            original, seen = getattr(holder, method), []

            def failing(*words: Any, **named: Any) -> Any:
                seen.append(1)
                if len(seen) == call:
                    how()
                return original(*words, **named)

            setattr(holder, method, failing)

        return install

    def by_torch() -> None:
        import torch

        torch.empty(1 << 60)

    def by_python() -> None:
        bytearray(1 << 62)

    faults = [
        fails("pipeline.train", "Trainer", "update", 3, by_torch),
        fails("pipeline.train", "Trainer", "update", 7, by_python),
        fails("pipeline.engines.embedded", "EmbeddedEngine", "generate", 2, by_torch),
        fails("verifiers.pool", "VerifierPool", "verify_many", 2, by_python),
        fails("pipeline.train", "Trainer", "update", 6, by_torch),
        fails("pipeline.rollout", "Rollouts", "draw", 3, by_torch),
        fails("pipeline.engines.embedded", "EmbeddedEngine", "generate", 16, by_python),
    ][:times]
    ended = grow(trial, len(faults), lambda n: faults[n] if n >= 0 else None, "out of memory")
    return trial.result(ended=ended)


FAULTS = {
    "kill": kill,
    "stop": stop,
    "fill": fill,
    "refuse": refuse,
    "limit": limit,
    "memory": memory,
    "damage": damage,
    "workers": workers,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="I/N: the I-th of N shares of the damage")
    parser.add_argument("faults", nargs="+", help=f"NAME=TIMES: {', '.join(FAULTS)}")
    known = parser.parse_args()
    # Before the first fork; nothing here computes, so no thread is lost in the children.
    for module in (
        *("data_prep.mixture", "data_prep.build", "eval.run", "eval.report"),
        *("pipeline.run", "pipeline.train", "pipeline.generate", "pipeline.verify"),
        "transformers.models.qwen2.modeling_qwen2",
    ):
        importlib.import_module(module)
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        getattr(transformers, name)
    first, _, step = known.part.partition("/")
    trial = Trial(known.out, known.seed, (int(first), int(step)))
    found: dict[str, Any] = {"undisturbed_s": round(trial.seconds, 1)}
    try:
        for words in known.faults:
            name, _, times = words.partition("=")
            if trial.disk.why_not and name in ("fill", "refuse"):
                found[name] = {"skipped": trial.disk.why_not}
                continue
            began = time.monotonic()
            found[name] = FAULTS[name](trial, int(times))
            found[name]["seconds"] = round(time.monotonic() - began, 1)
            print(f"{name}: {found[name]['seconds']} s", file=sys.stderr, flush=True)
    finally:
        trial.disk.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
