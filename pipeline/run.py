"""Run every stage of a configuration in order, skipping what is done.

    python -m pipeline.run --config pipeline/configs/cpu.toml
    python -m pipeline.run --config pipeline/configs/cpu.toml --seed 2 --out runs/cpu-seed2

Each stage is the command that a user would type, in a process of its own: what it prints here is
what it prints alone, its memory is given back when it ends, and a kill takes nothing else along.
Killed and started again, the run goes on: complete stages are skipped, an interrupted one
continues from its last shard or training state.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_prep.arguments import Arguments
from data_prep.config import dump_toml, signed_toml, validate
from data_prep.errors import UserError, command, go_on
from data_prep.files import writing
from pipeline.config import RunConfig, load_run
from pipeline.forecast import announce
from pipeline.launch import launch_of, refuse_without_ranks
from pipeline.methods import create_method
from pipeline.plan import models_of
from pipeline.preflight import preflight

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def stages_of(run: RunConfig) -> list[tuple[str, list[str]]]:
    """Return (name, module and arguments) of every stage, in the order that inputs demand.

    A training stage waits for its `init` and, where its method trains on samples, for generate
    and verify; generate waits for the checkpoint that samples.

    Raises:
        UserError: A stage waits for something that no stage makes.
    """
    trained = {stage.name for stage in run.train}
    waiting: dict[str, tuple[set[str], list[str]]] = {}
    if run.mixture is not None:
        waiting["mixture"] = (set(), ["data_prep.mixture"])
    if run.data is not None:
        # Its tokenizer is the mixture's, where that trains one.
        waiting["data"] = (set(waiting), ["data_prep.build"])
    made_before = set(waiting)
    if run.generate is not None:
        made = {run.generate.model} & trained
        waiting["generate"] = ({*made_before, *made}, ["pipeline.generate"])
        waiting["verify"] = ({"generate"}, ["pipeline.verify"])
    for stage in run.train:
        method = create_method(stage.method)
        needs = made_before | ({stage.init, *models_of(stage, method).values()} & trained)
        if method.source == "samples":
            needs.add("verify")
        waiting[stage.name] = (needs, ["pipeline.train", "--stage", stage.name])
    if run.evaluate is not None:
        waiting["evaluate"] = (set(waiting), ["eval.run"])
        waiting["report"] = ({"evaluate"}, ["eval.report"])
    order: list[tuple[str, list[str]]] = []
    done: set[str] = set()
    while waiting:
        ready = next((name for name, (needs, _) in waiting.items() if needs <= done), None)
        if ready is None:
            name, (needs, _) = next(iter(waiting.items()))
            raise UserError(
                f"stage {name!r}",
                f"waits for {', '.join(sorted(needs - done))}, which nothing makes in time",
                "a table for every input",
                "add a [generate] table, or mend `init` and `generate.model`",
            )
        order.append((ready, waiting.pop(ready)[1]))
        done.add(ready)
    return order


def resolve(path: str | Path, changes: dict[str, Any]) -> RunConfig:
    """Load a configuration and apply `--seed`, `--out` and `--name` where they were given."""
    run = load_run(path)
    given = {key: value for key, value in changes.items() if value is not None}
    return validate(RunConfig, {**run.model_dump(), **given}, "command line")


def run_all(run: RunConfig, *, forecasts: bool = True, launch: str = "") -> None:
    """Run the stages as processes of their own.

    Args:
        run: What to run.
        forecasts: Whether training stages say what they will take, and may refuse it.
        launch: Words that start a training stage in several processes, such as "torchrun
            --nproc-per-node 8"; empty starts one.

    Raises:
        SystemExit: With a stage's status, when it fails.
    """
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.toml"
    with writing(config) as temporary:
        temporary.write_text(signed_toml(run), encoding="utf-8")
    order = stages_of(run)
    began = time.monotonic()
    for number, (name, words) in enumerate(order, start=1):
        where = ["--run", str(out)] if name == "report" else ["--config", str(config)]
        arguments = [words[0], *where, *words[1:]]
        if not forecasts and words[0] == "pipeline.train":
            arguments.append("--no-forecast")
        trains = words[0] == "pipeline.train"
        start = shlex.split(launch) if launch and trains else [sys.executable]
        shown = " ".join(start) if launch and trains else "python"
        print(
            f"[{number}/{len(order)}] {name}: {shown} -m {' '.join(arguments)}",
            file=sys.stderr,
            flush=True,
        )
        status = _call([*start, "-m", *arguments])
        if status:
            print(
                f"stage {name!r} {_ended(status)} after {time.monotonic() - began:.0f} s; "
                f"{go_on()}",
                file=sys.stderr,
            )
            raise SystemExit(status if status > 0 else 128 - status)
    print(f"{len(order)} stages in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if run.evaluate is not None:
        print(out / "report" / "report.html")


def _ended(status: int) -> str:
    """Return how a stage ended, in words."""
    if status > 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    # The kernel kills so when memory is short, and tells nobody but its log.
    return f"was ended by {name}" + (" (too little memory?)" if name == "SIGKILL" else "")


def _call(words: list[str]) -> int:
    """Run a stage; hand an interrupt on to it and wait until it has ended."""
    process = subprocess.Popen(  # noqa: S603 - our own modules
        words, env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=_die_with_parent
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal has sent Ctrl-C to the stage too, which takes both as one wish; who sent
        # SIGTERM has not.
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, also by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m pipeline.run", __doc__)
    parser.also = "one stage and its keys by its own command (pipeline.train --stage …)"
    parser.add_argument("--config", required=True, help="a run's TOML")
    parser.add_argument("--seed", type=int, help="replaces the configuration's seed")
    parser.add_argument("--out", help="replaces the configuration's run folder")
    parser.add_argument("--name", help="replaces the configuration's name")
    parser.add_argument(
        "--launch",
        default="",
        help='what starts training stages in several processes: "torchrun --nproc-per-node 8"',
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved TOML and the forecast, and stop"
    )
    parser.add_argument(
        "--no-forecast", action="store_true", help="start whatever memory, time and disk it takes"
    )
    known = parser.parse_args(arguments)
    run = resolve(known.config, {"seed": known.seed, "out": known.out, "name": known.name})
    stages_of(run)
    preflight(run)
    if known.dry_run:
        print(dump_toml(run))
    refuse_without_ranks(shlex.split(known.launch))
    if not known.no_forecast:
        announce(run, launch=launch_of(shlex.split(known.launch)))
    if not known.dry_run:
        run_all(run, forecasts=not known.no_forecast, launch=known.launch)


if __name__ == "__main__":
    command(main)
