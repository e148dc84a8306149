"""Whether two answers in words are the same: choices, times of day, dates, names."""

from __future__ import annotations

from .nodes import Node

CHOICES = frozenset("ABCDEFGHIJ")


def worded(a: Node, b: Node) -> str | None:
    """Compare two answers of which one at least is in words.

    Args:
        a: A choice, word, text, time of day, date, or anything else.
        b: Another.

    Returns:
        The rule under which they are the same; None when they are not.
    """
    if a[0] == "choice" or b[0] == "choice":
        letter_a = a[1] if a[0] in ("choice", "sym") else None
        letter_b = b[1] if b[0] in ("choice", "sym") else None
        return "choice" if letter_a is not None and letter_a == letter_b else None
    if a[0] != b[0]:
        return None
    if a[0] == "clock":
        if a[4] and b[4]:
            return "clock" if a == b else None
        # 5:00 PM is 17:00; an unmarked 5:00 may be either half of the day.
        same_time = a[1:4] == b[1:4] or _on_day(a) == _on_day(b)
        return "clock" if same_time else None
    if a[0] == "date":
        same_day = a[1:3] == b[1:3] and (a[3] == b[3] or a[3] is None or b[3] is None)
        return "date" if same_day else None
    return a[0] if a == b else None


def _on_day(clock: Node) -> tuple[int, int, int]:
    _, hours, minutes, seconds, half = clock
    if half:
        hours = hours % 12 + (12 if half == "p" else 0)
    return hours, minutes, seconds


def letters(node: Node) -> list[str] | None:
    """Return the letters of a choice of several: AC, or A and C; None for anything else."""
    parts = node[1] if node[0] in ("mul", "list", "set") else (node,)
    if all(part[0] == "sym" and part[1] in CHOICES for part in parts):
        return sorted(part[1] for part in parts)
    return None
