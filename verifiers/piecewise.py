"""Whether two functions given piece by piece are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .nodes import Node

Rows = tuple[tuple[Node, ...], ...]
Same = Callable[[Node, Node], str | None]
_OTHERWISE: Node = ("word", "otherwise")


class Piece(NamedTuple):
    """One row of a function in pieces.

    Attributes:
        value: What the function is there.
        condition: Where that is; None for "otherwise".
    """

    value: Node
    condition: Node | None


def same_pieces(first: Rows, second: Rows, same: Same) -> str | None:
    """Compare two functions in pieces, whatever the order of their rows.

    Each row must meet one of the other side with the same value and the same condition. An
    "otherwise" stands for whatever condition the other side gives to the row that is left.

    Args:
        first: Rows as the parser read them: a value and its condition.
        second: Likewise.
        same: Compares two trees.

    Returns:
        The rule `piecewise`, or None when they are not the same or are no such functions.

    Raises:
        UndecidedError: `same` could not tell.
    """
    left, right = _pieces(first), _pieces(second)
    if left is None or right is None or len(left) != len(right):
        return None
    # Stated conditions first, so that an "otherwise" is left with what remains.
    left.sort(key=lambda piece: piece.condition is None)
    right.sort(key=lambda piece: piece.condition is None)
    for piece in left:
        found = next((p for p in right if _meet(piece, p, same)), None)
        if found is None:
            return None
        right.remove(found)
    return "piecewise"


def _meet(one: Piece, other: Piece, same: Same) -> bool:
    here, there = one.condition, other.condition
    if here is not None and there is not None and same(here, there) is None:
        return False
    return same(one.value, other.value) is not None


def _pieces(rows: Rows) -> list[Piece] | None:
    found: list[Piece] = []
    for row in rows:
        if len(row) == 1 and row[0][0] == "cond":
            row = row[0][1:]
        if len(row) != 2:
            return None
        found.append(Piece(row[0], None if row[1] == _OTHERWISE else row[1]))
    if sum(piece.condition is None for piece in found) > 1:
        return None
    return found
