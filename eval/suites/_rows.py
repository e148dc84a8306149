"""Rows of a suite: from a local file, or from the hub's copy through `datasets`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import Row, read_rows
from eval.suites import SuiteConfig

Place = tuple[str, int, Row]


def suite_rows(
    config: SuiteConfig, hub: str = "", subset: str | None = None, split: str = "test"
) -> Iterator[Place]:
    """Yield ("file, line n", number of the row from 0, row).

    Args:
        config: With `path`, or for the hub's copy `hub` and `revision`.
        hub: The suite's own hub id; empty where it has none.
        subset: Name of the configuration on the hub.
        split: Split on the hub.

    Raises:
        UserError: There is no file, or the hub's copy cannot be had.
    """
    if config.path:
        for index, (line, row) in enumerate(read_rows(config.path)):
            yield f"{config.path}, line {line}", index, row
        return
    name = config.hub or hub
    if not name:
        raise UserError(
            f"suite {config.kind!r}",
            "no path, and it has no copy on the hub",
            "a local file",
            f"give one: --suites {config.kind}=FILE.jsonl",
        )
    for index, row in enumerate(_hub_rows(name, subset, split, config)):
        yield f"{name} {subset or ''} {split}, row {index}".replace("  ", " "), index, dict(row)


def _hub_rows(name: str, subset: str | None, split: str, config: SuiteConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            name,
            None if Path(name).is_dir() else subset,
            split=split,
            revision=config.revision or None,
        )
    except Exception as error:
        raise UserError(
            f"suite {config.kind!r}",
            f"{name} could not be loaded from the hub: {type(error).__name__}: {error}",
            "a dataset that can be reached, with the split " + repr(split),
            f"download its file and give it: --suites {config.kind}=FILE.jsonl",
        ) from None


def number_text(value: Any, where: str, column: str) -> str:
    """Return a gold that a file may hold as text or as a number: 27.0 reads "27".

    Raises:
        UserError: It is neither.
    """
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if float(value).is_integer() else repr(value)
    raise UserError(
        where, f"column {column!r} is {value!r:.80}", "a number or a text", "mend or remove the row"
    )
