"""Runs whose files are cut off, changed or removed."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

from faults.attempt import Attempt, message_of
from faults.recorded_run import contents, copy, differences
from faults.trial import Trial

# Of stages whose folder has another name.
FOLDERS = {
    "data_prep.mixture": "mixture",
    "data_prep.build": "data",
    "pipeline.generate": "generate",
    "pipeline.verify": "verify",
    "eval.run": "samples",
}


def top(file: str) -> str:
    """Return the run folder's entry that a file is or lies in."""
    return Path(file).parts[0]


def ended(attempt: Attempt, after: str) -> int:
    """Wait; return the exit status, 0 too where the stage `after` was reached and killed."""
    status = attempt.finish()
    return 0 if after and status == -signal.SIGKILL and attempt.where == after else status


def damage(trial: Trial, times: int) -> dict[str, Any]:
    """Cut, change or remove a file of a complete or an interrupted run; nothing may be lost.

    Each kind of file has its turn with each kind of damage; `times` of these, drawn, or all (0).
    An interrupted run goes on until its stage is complete; what follows from equal files is equal.
    """
    rng = trial.rng()
    order = list(trial.stages)
    next_stage = dict(pairwise(order))
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
        after = next_stage.get(name, "")
        plan = {"kind": "before", "stage": after, "at": 1}
        attempt = trial.attempt(0, plan=plan)
        status = ended(attempt, after)
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
            attempt = trial.attempt(1, plan=plan)
            status = ended(attempt, after)
        else:
            outcome = "repaired" if within.name in said else "made again"
        left = contents(trial.out)
        made = {top(file) for file in left}
        wrong = differences({k: v for k, v in trial.expected.items() if top(k) in made}, left)
        if after and FOLDERS.get(name, name) not in made:
            wrong.append(f"no {name}")
        if status or wrong:
            raise SystemExit(f"{name}: {within} {how}: {status}, {wrong}:\n{attempt.said[-4000:]}")
        found.append({"run": name, "kind": kind, "how": how, "outcome": outcome})
        trial.tell(damage=f"{len(found)}/{len(chosen)}", **found[-1])
        trial.clear()
    return {"differences": [], "cases": len(chosen), "found": found}


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
