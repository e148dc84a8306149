"""The training state on disk: enough to go on bit for bit, in safetensors, never pickled.

Beside parameters and moments a state knows what the stage's folder held when it was saved
(records, rollouts, batches drawn ahead). It is gone on from only where all of that is still there,
byte for byte; otherwise the one before it is.

    state/step-000200/state.safetensors   parameters, moments
                      state.json          its hash, and size and hash of what else the folder held
    state/files.jsonl                     size and hash of each step's logs, a line each

A step's logs never change again, so a state names them by its part of `files.jsonl`: saving
costs the same at step 100,000 as at step 100.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from data_prep.errors import UserError
from data_prep.files import disk_errors, file_hash, prefix_hash, prefix_of, sync
from data_prep.jsonl import write_json
from data_prep.manifest import FORMAT, VOLATILE, read_sealed, sealed
from pipeline.ranks import ALONE, Ranks
from pipeline.split import part_for, whole

LEDGER = "state/files.jsonl"
# Files that grow: what stands behind a state's own part belongs to later steps.
GROWING = ("steps.jsonl", "warnings.jsonl", LEDGER)
# Folders with a file for each step, which is not changed once the step is taken.
LOGS = ("rollouts", "coefficients")
_LOG = re.compile(r"step-(\d+)\.jsonl")


@dataclass(slots=True)
class Part:
    """One model of the training state.

    Attributes:
        module: Its trainable parameters are saved; all of them where there is no optimizer (a
            reference that is reset now and then).
        optimizer: Its moments and counters are saved, by parameter name.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is saved, by name."""
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad or self.optimizer is None
        }


def save_state(
    work: Path,
    step: int,
    parts: dict[str, Part],
    keep: int = 2,
    needed: Iterable[Path] = (),
    ranks: Ranks = ALONE,
) -> int:
    """Write `state/step-<n>` under a temporary name, sync, rename; keep the last ones.

    What is written does not show how many processes wrote it.

    Args:
        work: The stage's folder.
        step: Number of steps taken.
        parts: What is saved, by a name that does not change.
        keep: States that are kept.
        needed: Files among the states that going on from this one takes.
        ranks: The processes that hold the parts; the leader writes.

    Returns:
        The step of the oldest state that is kept.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, value in _tensors(parts):
        value = whole(value)
        if ranks.leads:
            # One by one out of the GPU's memory, where all of them are split.
            tensors[key] = value.cpu() if ranks.shards else value
    if not ranks.leads:
        return step
    folder = work / "state"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"step-{step:06d}.tmp"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    path = made / "state.safetensors"
    try:
        with disk_errors(path):
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            sync(path)
        _list_logs(work, step)
        for name in GROWING:
            if (work / name).is_file():
                sync(work / name)
        files = {
            str(path.relative_to(work)): [path.stat().st_size, file_hash(path)]
            for path in (*_beside(work), *_ahead(work, step), *_ledger(work), *needed)
        }
        note = {"format": FORMAT, "step": step, "sha256": file_hash(path), "files": files}
        write_json(made / "state.json", sealed(note))
    except BaseException:
        # A full disk gets its space back.
        shutil.rmtree(made, ignore_errors=True)
        raise
    final = folder / f"step-{step:06d}"
    shutil.rmtree(final, ignore_errors=True)
    made.rename(final)
    sync(folder)
    states = _states(folder)
    for old in states[:-keep]:
        shutil.rmtree(old)
    return _step(states[-keep:][0])


def _tensors(parts: dict[str, Part]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is saved, by its key in the file, in an order that all processes share."""
    for key, part in parts.items():
        for name, parameter in part.parameters().items():
            yield f"{key}.{name}", parameter.detach()
            moments = part.optimizer.state.get(parameter, {}) if part.optimizer else {}
            for moment, value in moments.items():
                yield f"optimizer/{moment}/{key}.{name}", torch.as_tensor(value)


def load_state(work: Path, parts: dict[str, Part], ranks: Ranks = ALONE) -> int:
    """Load the newest sound state into its parts; return its step, 0 for none.

    A state that is damaged, or whose files beside it are, is passed over for the one before it,
    and that is said. Files that later steps had left are removed: those steps are taken again.

    Args:
        work: The stage's folder.
        parts: What is filled; split ones take their part of what was saved whole.
        ranks: The processes that fill them; the leader looks which state is sound.

    Raises:
        UserError: States are there and none of them is sound.
    """
    found = ranks.lead(lambda: _newest(work))
    if found is None:
        return 0
    with safe_open(found / "state.safetensors", framework="pt") as file:
        for key, part in parts.items():
            _fill(part, key, file)
    return _step(found)


def _newest(work: Path) -> Path | None:
    """Return the newest sound state, and forget what it does not stand on."""
    found, damaged = [], []
    for path in reversed(_states(work / "state")):
        damage = _damage(work, path)
        if damage is None:
            if found:
                print(f"{'; '.join(found)}; going on from step {_step(path)}", file=sys.stderr)
            for later in damaged:
                shutil.rmtree(later)
            files = read_sealed(path / "state.json", "").get("files", {})
            for name in GROWING:
                # Also what is damaged behind its part, and could not be read.
                if (work / name).is_file():
                    os.truncate(work / name, files.get(name, [0])[0])
            _forget(work, {*files}, _step(path) if LEDGER in files else 0)
            return path
        found.append(damage)
        damaged.append(path)
    if found:
        raise UserError(
            str(work / "state"),
            f"no saved training state can be gone on from: {'; '.join(found)}",
            "a sound state",
            f"remove {work} to start the stage again",
        )
    for ledger in _ledger(work):
        ledger.unlink()
    _forget(work, set())
    return None


def _ledger(work: Path) -> list[Path]:
    """Return the ledger, where there is one."""
    return [work / LEDGER] if (work / LEDGER).is_file() else []


def _beside(work: Path) -> Iterator[Path]:
    """Yield the files of a stage's folder that steps have left; not the states, not the logs."""
    for folder, folders, names in os.walk(work):
        if folder == str(work):
            folders[:] = sorted({*folders} - {"state", *LOGS})
        folders.sort()
        for name in sorted(names):
            if not name.endswith(".tmp") and name not in VOLATILE:
                yield Path(folder, name)


def _logs_of(work: Path, steps: Iterable[int]) -> Iterator[tuple[int, Path]]:
    """Yield the logs of some steps, those that there are.

    They are asked for by name: to list a folder of a hundred thousand at each state would take
    longer than the steps between two.
    """
    folders = [work / folder for folder in LOGS if (work / folder).is_dir()]
    for step in steps if folders else ():
        for folder in folders:
            path = folder / f"step-{step:05d}.jsonl"
            if path.is_file():
                yield step, path


def _ahead(work: Path, step: int) -> Iterator[Path]:
    """Yield the logs of batches that were drawn ahead, from `step` on."""
    while found := [path for _, path in _logs_of(work, [step])]:
        yield from found
        step += 1


def _list_logs(work: Path, step: int) -> None:
    """Add the logs of the steps before `step` that are not in the ledger yet."""
    found = list(_logs_of(work, range(_last_listed(work) + 1, step)))
    if not found:
        return
    with disk_errors(work / LEDGER), (work / LEDGER).open("a", encoding="utf-8") as file:
        for number, path in found:
            size = path.stat().st_size
            # Not `file_hash`, which would keep every one of them in memory.
            content = prefix_hash(path, size)
            name = str(path.relative_to(work))
            row = {"name": name, "step": number, "size": size, "sha256": content}
            file.write(json.dumps(row) + "\n")


def _last_listed(work: Path) -> int:
    """Return the step of the ledger's last line, -1 where there is none."""
    for path in _ledger(work):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines()
        if lines:
            return int(json.loads(lines[-1])["step"])
    return -1


def _listed(work: Path, size: int) -> Iterator[tuple[str, int, str]]:
    """Yield name, size and SHA-256 of the logs in the ledger's first `size` bytes."""
    for path in _ledger(work):
        with path.open("rb") as file:
            while file.tell() < size:
                row = json.loads(file.readline())
                yield row["name"], row["size"], row["sha256"]


def _forget(work: Path, kept: set[str], step: int = 0) -> None:
    """Remove the files that a state of `step` steps, whose ledger has its logs, does not name."""
    for path in _beside(work):
        if str(path.relative_to(work)) not in kept:
            path.unlink()
    for folder in LOGS:
        if not (work / folder).is_dir():
            continue
        with os.scandir(work / folder) as entries:
            for entry in entries:
                log = _LOG.fullmatch(entry.name)
                listed = log is not None and int(log[1]) < step
                if not listed and f"{folder}/{entry.name}" not in kept:
                    os.unlink(entry.path)


def _damage(work: Path, state: Path) -> str | None:
    """Return what is wrong with a state, None for nothing."""
    try:
        note = read_sealed(state / "state.json", "")
        if file_hash(state / "state.safetensors") != note["sha256"]:
            return f"{state / 'state.safetensors'} is damaged"
        if note["step"] != _step(state):
            return f"{state} holds the state of step {note['step']}"
    except (UserError, OSError, KeyError) as error:
        where = error.where if isinstance(error, UserError) else state / "state.safetensors"
        return f"{where} is missing or damaged"
    files = note.get("files", {})
    own = [(name, size, content) for name, (size, content) in files.items()]
    damage = _damaged_file(work, own)
    if damage is None and LEDGER in files:
        damage = _damaged_file(work, _listed(work, files[LEDGER][0]))
    return damage


def _damaged_file(work: Path, files: Iterable[tuple[str, int, str]]) -> str | None:
    """Return what is wrong with the first file that is not as it was, None for nothing."""
    for name, size, content in files:
        path = f"{work}/{name}"  # there may be a hundred thousand: no `Path` of each
        try:
            with open(path, "rb") as file:
                held = os.fstat(file.fileno()).st_size
                found = prefix_of(file, size) if held >= size else ""
        except OSError:
            return f"{path} is missing"
        if found != content or (held > size and name not in GROWING):
            return f"{path} is damaged"
    return None


@torch.no_grad()
def _fill(part: Part, key: str, file: Any) -> None:
    moments: dict[str, list[str]] = {}
    for name in file.keys():  # noqa: SIM118 - the file is no mapping
        if name.startswith("optimizer/"):
            _, moment, owner = name.split("/", 2)
            moments.setdefault(owner, []).append(moment)
    for name, parameter in part.parameters().items():
        parameter.copy_(part_for(parameter, file.get_tensor(f"{key}.{name}")))
        found = moments.get(f"{key}.{name}")
        if part.optimizer is not None and found:
            part.optimizer.state[parameter] = {
                moment: _moment(
                    moment, parameter, file.get_tensor(f"optimizer/{moment}/{key}.{name}")
                )
                for moment in found
            }


def _moment(name: str, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    # The step counter stays whole, and beside its parameter: fused AdamW refuses another device.
    return value.to(parameter.device) if name == "step" else part_for(parameter, value)


def _states(folder: Path) -> list[Path]:
    states = (p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".tmp")
    return sorted(states, key=_step)


def _step(state: Path) -> int:
    return int(state.name.removeprefix("step-"))
