"""The training state on disk: enough to go on bit for bit, in safetensors, never pickled."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.errors import UserError
from data_prep.jsonl import read_json, write_json
from data_prep.run_folder import file_hash, sync_folder

KEEP = 2


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


def save_state(folder: Path, step: int, parts: dict[str, Part]) -> None:
    """Write `step-<n>` under a temporary name, sync, rename; keep the last two.

    Args:
        folder: Where the states of this stage live.
        step: Number of steps taken.
        parts: What is saved, by a name that does not change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f"step-{step:06d}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for key, part in parts.items():
        for name, parameter in part.parameters().items():
            tensors[f"{key}.{name}"] = parameter.detach()
            moments = part.optimizer.state.get(parameter, {}) if part.optimizer else {}
            for moment, value in moments.items():
                tensors[f"optimizer/{moment}/{key}.{name}"] = torch.as_tensor(value)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, work / "state.safetensors"
    )
    write_json(work / "state.json", {"step": step, "sha256": file_hash(work / "state.safetensors")})
    final = folder / f"step-{step:06d}"
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    sync_folder(folder)
    for old in _states(folder)[:-KEEP]:
        shutil.rmtree(old)


def load_state(folder: Path, parts: dict[str, Part]) -> int:
    """Load the newest sound state into its parts; return its step, 0 for none.

    A damaged state (its hash differs) is passed over for the one before it.

    Raises:
        UserError: States are there and none of them is sound.
    """
    states = _states(folder)
    for path in reversed(states):
        note: dict[str, Any] = {}
        try:
            note = read_json(path / "state.json")
            sound = file_hash(path / "state.safetensors") == note["sha256"]
        except (UserError, OSError, KeyError):
            sound = False
        if not sound:
            continue
        tensors = load_file(path / "state.safetensors")
        for key, part in parts.items():
            _fill(part, key, tensors)
        return int(note["step"])
    if states:
        raise UserError(
            str(folder),
            "every saved training state is damaged",
            "a sound state",
            "remove this folder to start the stage again",
        )
    return 0


@torch.no_grad()
def _fill(part: Part, key: str, tensors: dict[str, torch.Tensor]) -> None:
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, moment, owner = name.split("/", 2)
            moments.setdefault(owner, {})[moment] = value
    for name, parameter in part.parameters().items():
        parameter.copy_(tensors[f"{key}.{name}"])
        found = moments.get(f"{key}.{name}")
        if part.optimizer is not None and found:
            # The step counter stays on the CPU, as AdamW itself keeps it.
            part.optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter.device)
                for moment, value in found.items()
            }


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".tmp")
