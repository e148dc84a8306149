"""One process that runs the pipeline, and how it ended."""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.reaper import Reaper

SLOWEST_S = 300.0


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
