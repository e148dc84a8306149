"""A number that is not finite stops the run, and the batch that made it is kept to be looked at."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import write_rows
from pipeline.batch import Sequence


class NonFiniteError(FloatingPointError):
    """A reward, objective or gradient is infinite or no number.

    Args:
        found: What was found, and where.
        sequences: What it was made of.
    """

    def __init__(self, found: str, sequences: list[Sequence]) -> None:
        """Keep both."""
        super().__init__(found)
        self.sequences = sequences


def keep_batch(error: NonFiniteError, folder: Path) -> UserError:
    """Write the sequences to `batch.jsonl`; return the error that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "batch.jsonl"
    write_rows(path, (_readable(asdict(s)) for s in error.sequences))
    return UserError(
        str(error),
        f"the batch is kept in {path}",
        "finite numbers",
        "look at the batch, or lower the learning rate; the command goes on from the last state",
    )


def _readable(value: Any) -> Any:
    """Return a JSON value in which numbers that JSON has not are words ("nan", "inf")."""
    if isinstance(value, dict):
        return {key: _readable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
