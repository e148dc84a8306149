"""What each token of a step was weighed with: `coefficients/step-00012.jsonl` of a stage.

A row a sequence that carried signal, in the step's order:

    group, sample_index  as in the step's rollouts
    advantage            one number, or one a completion token
    coefficient          c_t = GC_t · is_t / Z, one a completion token, before the first update
    last_coefficient     the same before the last update on the batch, where there are several

The gradient of the step is Σ c_t ∇ log π(o_t). Numbers have four digits; a token that carries no
loss has null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.jsonl import read_rows, write_rows
from pipeline.batch import Sequence

Watched = dict[str, Tensor]


def path_of(stage: Path, step: int) -> Path:
    """Return the file of a step."""
    return stage / "coefficients" / f"step-{step:05d}.jsonl"


def write_coefficients(stage: Path, step: int, sequences: list[Sequence], watched: Watched) -> None:
    """Write a step's file.

    Args:
        stage: The stage's folder.
        step: Which.
        sequences: N, as the trainer took them.
        watched: Name → [T], the values of the loss-carrying tokens.
    """
    path = path_of(stage, step)
    path.parent.mkdir(exist_ok=True)
    lengths = [sum(s.mask) for s in sequences]
    parts = {name: torch.split(values, lengths) for name, values in watched.items()}
    rows = []
    for index, s in enumerate(sequences):
        row: dict[str, Any] = {"group": s.group, "sample_index": s.sample_index}
        for name, values in parts.items():
            found = [_short(value) for value in values[index].tolist()]
            if name == "advantage" and len(set(found)) == 1:
                row[name] = found[0]
                continue
            kept = iter(found)
            row[name] = [next(kept) if carries else None for carries in s.mask]
        rows.append(row)
    write_rows(path, rows)


def read_coefficients(stage: Path, step: int) -> dict[tuple[int, int], dict[str, Any]]:
    """Return a step's rows by (group, sample index); empty where none were kept."""
    path = path_of(stage, step)
    if not path.is_file() or not path.stat().st_size:
        return {}
    return {(row["group"], row["sample_index"]): row for _, row in read_rows(path)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
