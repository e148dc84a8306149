"""Runs that are killed, or asked to stop."""

from __future__ import annotations

import signal
from typing import Any

from faults.trial import Trial


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
