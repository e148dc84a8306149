"""`python -m verifiers audit`: golds that cannot be judged, or fail against themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .boxes import last_boxes
from .jsonl import RowError, rows
from .judge import verify
from .reading import read
from .rewrite import rewritings

FIELDS = (
    "gold",
    "final_answer",
    "golden",
    "expected_answer",
    "answer",
    "Answer",
    "target",
    "solution",
)
_HASHES = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)


class Finding(NamedTuple):
    """A gold that needs a look.

    Attributes:
        line: Its line in the file.
        gold: The gold.
        problem: `empty`, `unread` (no form is known, only the same text matches),
            `words` (compared word by word), `rewriting` (not equal to itself in
            another notation) or `self` (not even as it is).
        reason: Details.
    """

    line: int
    gold: str
    problem: str
    reason: str


def gold_of(row: Mapping[str, Any], path: Path, line: int, field: str | None = None) -> str:
    r"""Return the gold of a row of any common data set.

    Lists are joined by commas, `#### x` and the last `\boxed{x}` are taken out of
    solutions.

    Args:
        row: The row.
        path: For the error.
        line: For the error.
        field: The key; by default the first of `FIELDS` that is there.

    Returns:
        The gold.

    Raises:
        RowError: No such key.
    """
    key = field or next((f for f in FIELDS if f in row), None)
    if key is None or key not in row:
        raise RowError(
            f"{path}, line {line}: no key {field or 'for the gold'!r}; found {sorted(row)}; "
            "name it with --field"
        )
    value = row[key]
    if isinstance(value, list):
        value = (
            ", ".join(str(v).strip().strip("$").rstrip(".$") for v in value)
            if len(value) != 1
            else value[0]
        )
    text = "" if value is None else str(value)
    marked = _HASHES.findall(text)
    if marked:
        return marked[-1]
    if key == "solution" or len(text) > 200:
        boxes = last_boxes(text)
        if boxes and boxes[-1].content is not None:
            return ", ".join(b.content for b in boxes if b.content)
    return text


def audit(path: Path, field: str | None = None) -> Iterator[Finding | None]:
    """Check every gold of a file.

    Args:
        path: File of JSON lines.
        field: The key of the gold.

    Yields:
        A finding, or None for a gold that holds; one for each row.

    Raises:
        RowError: A row without the key.
    """
    for line, row in rows(path):
        yield examine(gold_of(row, path, line, field), line)


def examine(gold: str, line: int = 0) -> Finding | None:
    """Check one gold against itself in other notations.

    Args:
        gold: The gold.
        line: For the finding.

    Returns:
        A finding, or None when the gold holds.
    """
    if not gold.strip():
        return Finding(line, gold, "empty", "there is no gold")
    boxed = verify(gold, f"\\boxed{{{gold}}}")
    if not boxed.is_correct:
        return Finding(line, gold, "self", f"{boxed.outcome.value} ({boxed.rule}): {boxed.detail}")
    reading = read(gold)
    if not reading.nodes:
        return Finding(line, gold, "unread", reading.problem)
    if reading.nodes[0][0] == "text":
        return Finding(line, gold, "words", "compared word by word")
    bare = gold.strip().strip("$").strip()
    for name, text in rewritings(bare).items():
        verdict = verify(gold, f"\\boxed{{{text}}}")
        if not verdict.is_correct:
            return Finding(line, gold, "rewriting", f"{name}: {text!r} is {verdict.outcome.value}")
    return None
