"""The training state on disk: enough to go on bit for bit, in safetensors, never pickled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.errors import UserError
from data_prep.jsonl import read_json, write_json
from data_prep.run_folder import file_hash, sync_folder

KEEP = 2


def save_state(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write `step-<n>` under a temporary name, sync, rename; keep the last two.

    Args:
        folder: Where the states of this stage live.
        step: Number of steps taken.
        model: Its parameters are saved.
        optimizer: Its moments and counters are saved, by parameter name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f"step-{step:06d}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    names = _names(model, optimizer)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
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


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest sound state into model and optimizer; return its step, 0 for none.

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
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for parameter, name in _names(model, optimizer).items():
            prefix = f"optimizer.{name}."
            found = {
                key[len(prefix) :]: value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            if found:
                # The step counter stays on the CPU, as AdamW itself keeps it.
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in found.items()
                }
        return int(note["step"])
    if states:
        raise UserError(
            str(folder),
            "every saved training state is damaged",
            "a sound state",
            "remove this folder to start the stage again",
        )
    return 0


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".tmp")


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        parameter: names[parameter]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
