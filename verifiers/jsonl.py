"""Rows of JSON lines, with errors that name the file, the row and the key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

# Characters of a line; what is longer is no row, and would only fill the memory.
_LONGEST = 64 << 20


class RowError(ValueError):
    """A row that is not what was expected; the message says where."""


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of JSON objects, one a line.

    Args:
        path: The file.

    Yields:
        The line number from 1, and the object; empty lines are passed over.

    Raises:
        RowError: No such file, a line that is too long or no JSON object.
    """
    if not path.is_file():
        raise RowError(f"no file {str(path)!r}; give a file with one JSON object a line")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(iter(partial(lines.readline, _LONGEST + 1), ""), start=1):
            if len(line) > _LONGEST:
                raise RowError(
                    f"{path}, line {number}: more than {_LONGEST} characters; expected one JSON "
                    "object a line"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RowError(
                    f"{path}, line {number}: not JSON ({error}); expected one object a line"
                ) from error
            if not isinstance(row, dict):
                raise RowError(
                    f"{path}, line {number}: found {type(row).__name__}, expected a JSON object"
                )
            yield number, row


def text_of(row: Mapping[str, Any], key: str, path: Path, number: int) -> str:
    """Return a text field of a row.

    Args:
        row: The row.
        key: The field.
        path: For the error.
        number: For the error.

    Returns:
        Its text; whole and decimal numbers are written out.

    Raises:
        RowError: The field is absent or neither text nor number.
    """
    if key not in row:
        raise RowError(f"{path}, line {number}: no key {key!r}; found {sorted(row)}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(
            f"{path}, line {number}, key {key!r}: found {type(value).__name__}, expected text"
        )
    return value if isinstance(value, str) else str(value)
