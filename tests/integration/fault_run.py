"""A whole embedded run that is killed, or whose disk is full, again and again.

    python tests/integration/fault_run.py kill --out DIR --times 50 --seed 1
    python tests/integration/fault_run.py fill --out DIR --times 20    # a tmpfs that grows (root)
    python tests/integration/fault_run.py limit --out DIR --times 20   # a limit on a file's size

Everything is imported once; each attempt is a forked child that runs `pipeline.run` with its
stages in its own process. It is killed by SIGKILL

    before   the n-th call that changes the run folder (an audit hook counts them, from outside)
    torn     in the middle of the n-th write: half of what it had to write is in the file
    moment   after a share of a stage's time, wherever that is

in every stage in turn. What is left in the end is compared, byte for byte, with a run that nothing
disturbed; JSON on the last line of the output says what was found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import select
import shutil
import signal
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
    """Counts what changes the run folder, and kills this process in the midst of it.

    Args:
        root: The run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = f"{root}{os.sep}"
        self.seen, self.at, self.is_torn = 0, 0, False
        self.victim: tuple[str, int] | None = None

    def install(self) -> None:
        """Look at every call from here on; there is no way back."""
        sys.addaudithook(self._hook)
        os.fsync = self._fsync  # raises no audit event

    def arm(self, at: int, is_torn: bool) -> None:
        """Strike at the `at`-th change from now, from 1."""
        self.seen, self.at, self.is_torn = 0, at, is_torn

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
                os.kill(os.getpid(), signal.SIGKILL)
            name = path if is_write else ""
            self.victim = (name, os.path.getsize(name) if os.path.isfile(name) else 0)


def run_here(config: Path, reaper: Reaper | None, plan: dict[str, Any], tell: Callable) -> int:
    """Run all stages in this process, as `pipeline.run` orders them; return the exit status."""
    from data_prep.errors import command
    from pipeline import run as run_module

    def call(words: list[str]) -> int:
        # [python, -m, module, arguments…]
        module, arguments = words[2], words[3:]
        name = arguments[-1] if "--stage" in arguments else module
        if reaper is not None and name == plan.get("stage"):
            reaper.arm(plan.get("at", 0), plan.get("kind") == "torn")
        tell(stage=name, seen=0 if reaper is None else reaper.seen)
        loaded = importlib.import_module(module)
        sys.argv = [str(loaded.__file__), *arguments]
        try:
            command(loaded.main)
        except SystemExit as end:
            return int(end.code or 0)

    run_module._call = call
    sys.argv = ["pipeline.run", "--config", str(config)]
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
    """

    def __init__(
        self,
        config: Path,
        log: Path,
        plan: dict[str, Any] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.plan = plan or {}
        self.stages: list[dict[str, Any]] = []
        self.log = log
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(reading)
            status = 1
            try:
                os.setsid()
                sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(sink, 1)
                os.dup2(sink, 2)

                def tell(**message: Any) -> None:
                    line = json.dumps(message | {"time": time.monotonic()})
                    os.write(writing, f"{line}\n".encode())

                import tomllib

                reaper = Reaper(Path(tomllib.loads(config.read_text())["out"]))
                reaper.install()
                if before is not None:
                    before()
                status = run_here(config, reaper, self.plan, tell)
                tell(stage="", seen=reaper.seen)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)
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
                if self.plan.get("kind") == "moment" and message["stage"] == self.plan["stage"]:
                    kill_at = time.monotonic() + self.plan["share"] * self.plan["seconds"]
        os.close(self._pipe)
        _, status = os.waitpid(self.pid, 0)
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
            manifest = {k: v for k, v in manifest.items() if k not in ("seconds", "seal")}
            data = json.dumps(manifest).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def differences(one: dict[str, str], two: dict[str, str]) -> list[str]:
    """Return the files that are not the same in two runs."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


class Trial:
    """A run that was not disturbed, and what others are compared with.

    Args:
        folder: Everything goes here.
        seed: Of the run.
        out: The run folder, where it is not in `folder`.
    """

    def __init__(self, folder: Path, seed: int, out: Path | None = None) -> None:
        self.folder, self.out = folder.resolve(), (out or folder / "run").resolve()
        self.config = write_config(self.folder, self.out, seed)
        began = time.monotonic()
        attempt = Attempt(self.config, self.folder / "whole.log")
        status = attempt.finish()
        if status:
            raise SystemExit(f"the undisturbed run ended with {status}:\n{attempt.said[-4000:]}")
        self.seconds = time.monotonic() - began
        self.expected = contents(self.out)
        self.size = sum(p.stat().st_size for p in self.out.rglob("*") if p.is_file())
        self.stages: dict[str, dict[str, float]] = {}
        for this, after in zip(attempt.stages, attempt.stages[1:], strict=False):
            self.stages[this["stage"]] = {
                "events": after["seen"] - this["seen"],
                "seconds": after["time"] - this["time"],
            }
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def attempt(self, number: int, **options: Any) -> Attempt:
        """Start the next attempt."""
        return Attempt(self.config, self.folder / f"attempt-{number:03d}.log", **options)

    def result(self, **found: Any) -> dict[str, Any]:
        """Compare what is left with what was expected."""
        wrong = differences(self.expected, contents(self.out))
        return {
            "files": len(self.expected),
            "differences": wrong,
            "undisturbed_s": round(self.seconds, 1),
            **found,
        }


def kill(folder: Path, times: int, seed: int) -> dict[str, Any]:
    """Kill a run `times` times, in every stage in turn, resuming each time."""
    trial = Trial(folder, seed)
    rng = random.Random(seed)
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

    for name in names:
        count = times // len(names) + (name in extra)
        for left in range(count, 0, -1):
            # A stage goes on from where it was; the last kill may fall anywhere in it.
            strike(name, 1.0 if left == 1 else 1.0 / count)
    while len(kills) < times:
        strike(names[-1], 1.0)
    last = trial.attempt(999)
    status = last.finish()
    if status:
        raise SystemExit(f"the last run ended with {status}\n{last.said[-4000:]}")
    return trial.result(kills=kills)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fault", choices=("kill",))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    known = parser.parse_args()
    # Before the first fork; nothing here computes, so no thread is lost in the children.
    for module in ("data_prep.mixture", "data_prep.build", "eval.run", "eval.report"):
        importlib.import_module(module)
    for module in ("pipeline.run", "pipeline.train", "pipeline.generate", "pipeline.verify"):
        importlib.import_module(module)
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        getattr(transformers, name)
    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    began = time.monotonic()
    found = {"kill": kill}[known.fault](known.out, known.times, known.seed)
    print(json.dumps({**found, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
