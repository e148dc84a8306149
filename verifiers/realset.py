"""Sets of real numbers: intervals, unions, inequalities in one variable."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from .equality import UndecidedError, approximate, equal, is_zero, substitute, symbols
from .nodes import Node

INFINITY = float("inf")
_FLIP = {"<": ">", ">": "<", "le": "ge", "ge": "le", "=": "=", "ne": "ne"}
_MAX_PIECES = 200


class Piece(NamedTuple):
    """One interval; a point when both ends are the same.

    Attributes:
        low: Lower end as a tree; None for minus infinity.
        high: Upper end as a tree; None for infinity.
        closed_low: Whether the lower end belongs to it.
        closed_high: Whether the upper end belongs to it.
    """

    low: Node | None
    high: Node | None
    closed_low: bool
    closed_high: bool


Pieces = tuple[Piece, ...]
_ALL: Pieces = (Piece(None, None, False, False),)


def pieces(node: Node) -> Pieces | None:
    """Read a tree as a set of reals.

    Args:
        node: An interval, union, inequality, set builder, membership.

    Returns:
        Disjoint pieces in ascending order (one piece may have symbolic ends);
        None when the tree is no such set.
    """
    kind = node[0]
    if kind == "group":
        return _interval(node)
    if kind == "std":
        return _standard(node[1])
    if kind == "set":
        return _points(node[1])
    if kind == "setop":
        return _operation(node)
    if kind == "rel":
        return _relation(node[1])
    if kind == "list":
        return _several(node)
    if kind == "builder":
        return _builder(node)
    return None


def same(first: Pieces, second: Pieces) -> bool:
    """Whether two sets are the same.

    Raises:
        UndecidedError: Ends that cannot be compared.
    """
    if len(first) != len(second):
        return False
    return all(
        a.closed_low == b.closed_low
        and a.closed_high == b.closed_high
        and _same_end(a.low, b.low)
        and _same_end(a.high, b.high)
        for a, b in zip(first, second, strict=True)
    )


def _same_end(a: Node | None, b: Node | None) -> bool:
    if a is None or b is None:
        return a is b
    return equal(a, b)


def _end(node: Node, *, low: bool) -> Node | None:
    """An end as a tree, None when it is infinite on its own side."""
    if node == ("const", "infty") and not low:
        return None
    if node == ("neg", ("const", "infty")) and low:
        return None
    if "infty" in repr(node):
        raise UndecidedError("an infinite end on the wrong side")
    return node


def _interval(node: Node) -> Pieces | None:
    _, opener, closer, items = node
    if len(items) != 2 or any(item[0] in ("group", "rel", "list", "qty", "set") for item in items):
        return None
    try:
        low, high = _end(items[0], low=True), _end(items[1], low=False)
    except UndecidedError:
        return None
    piece = Piece(low, high, opener == "[" and low is not None, closer == "]" and high is not None)
    at_low, at_high = _place(piece.low, -INFINITY), _place(piece.high, INFINITY)
    if at_low is None or at_high is None:
        return (piece,)
    if at_low > at_high or (at_low == at_high and not (piece.closed_low and piece.closed_high)):
        return None
    return (piece,)


def _place(end: Node | None, infinite: float) -> float | None:
    return infinite if end is None else approximate(end)


def _standard(name: str) -> Pieces | None:
    zero: Node = ("num", Fraction(0))
    return {
        "R": _ALL,
        "R+": (Piece(zero, None, False, False),),
        "R-": (Piece(None, zero, False, False),),
        "R*": (Piece(None, zero, False, False), Piece(zero, None, False, False)),
        "R>0": (Piece(zero, None, False, False),),
    }.get(name)


def _points(items: tuple[Node, ...]) -> Pieces | None:
    if any(approximate(item) is None for item in items):
        return None
    return _merge([Piece(item, item, True, True) for item in items])


def _merge(found: list[Piece]) -> Pieces | None:
    """Sort and join pieces; None when their ends cannot be ordered."""
    if len(found) == 1:
        return tuple(found)
    keyed = []
    for piece in found:
        low, high = _place(piece.low, -INFINITY), _place(piece.high, INFINITY)
        if low is None or high is None:
            return None
        keyed.append((low, not piece.closed_low, high, piece))
    keyed.sort(key=lambda k: k[:3])
    out: list[tuple[float, float, Piece]] = []
    for low, _, high, piece in keyed[:_MAX_PIECES]:
        if out:
            last_low, last_high, last = out[-1]
            touching = _near(low, last_high) and (last.closed_high or piece.closed_low)
            if (low < last_high and not _near(low, last_high)) or touching:
                if high > last_high and not _near(high, last_high):
                    joined = Piece(last.low, piece.high, last.closed_low, piece.closed_high)
                    out[-1] = (last_low, high, joined)
                else:
                    closed = last.closed_high or (piece.closed_high and _near(high, last_high))
                    out[-1] = (last_low, last_high, last._replace(closed_high=closed))
                continue
        out.append((low, high, piece))
    return tuple(piece for _, _, piece in out)


def _near(a: float, b: float) -> bool:
    return a == b or (
        abs(a) != INFINITY and abs(b) != INFINITY and abs(a - b) < 1e-11 * max(1.0, abs(a))
    )


def _operation(node: Node) -> Pieces | None:
    left, right = pieces(node[2]), pieces(node[3])
    if left is None or right is None:
        return None
    if node[1] == "cup":
        return _merge([*left, *right])
    if node[1] == "cap":
        return _intersect(left, right)
    outside = _complement(right)
    return None if outside is None else _intersect(left, outside)


def _complement(found: Pieces) -> Pieces | None:
    ordered = _merge(list(found))
    if ordered is None:
        return None
    out: list[Piece] = []
    low: Node | None = None
    closed, open_ended = False, True
    for piece in ordered:
        if piece.low is not None:
            out.append(Piece(low, piece.low, closed and low is not None, not piece.closed_low))
        low, closed = piece.high, not piece.closed_high
        if low is None:
            open_ended = False
    if open_ended:
        out.append(Piece(low, None, closed and low is not None, False))
    return tuple(out)


def _intersect(first: Pieces, second: Pieces) -> Pieces | None:
    out: list[Piece] = []
    for a in first:
        for b in second:
            ends = [
                _place(a.low, -INFINITY),
                _place(b.low, -INFINITY),
                _place(a.high, INFINITY),
                _place(b.high, INFINITY),
            ]
            if any(end is None for end in ends):
                return None
            a_low, b_low, a_high, b_high = (float(end or 0.0) for end in ends)
            if _near(a_low, b_low):
                low, closed_low = a.low, a.closed_low and b.closed_low
            else:
                low, closed_low = (a.low, a.closed_low) if a_low > b_low else (b.low, b.closed_low)
            if _near(a_high, b_high):
                high, closed_high = a.high, a.closed_high and b.closed_high
            else:
                high, closed_high = (
                    (a.high, a.closed_high) if a_high < b_high else (b.high, b.closed_high)
                )
            bottom, top = max(a_low, b_low), min(a_high, b_high)
            if (bottom < top and not _near(bottom, top)) or (
                _near(bottom, top) and closed_low and closed_high
            ):
                out.append(Piece(low, high, closed_low, closed_high))
    return _merge(out) if out else ()


def _several(node: Node) -> Pieces | None:
    parts = [pieces(item) if item[0] in ("rel", "cond") else None for item in node[1]]
    if any(part is None for part in parts) or len(parts) > 12:
        return None
    # "x < 1 or x > 3" is a union, "x > 1 and x < 3" an intersection; a comma may
    # be either: it is a union when the intersection is empty.
    found = [part for part in parts if part is not None]
    both: Pieces | None = found[0]
    for part in found[1:]:
        both = None if both is None else _intersect(both, part)
    either = _merge([piece for part in found for piece in part])
    if "or" in node[2]:
        return either
    return both if both else (either if "and" not in node[2] else both)


def _relation(parts: tuple[Any, ...]) -> Pieces | None:
    """Solve a chain of relations that are linear in its one variable."""
    if len(parts) == 3 and parts[1] == "in":
        return pieces(parts[2])
    if len(parts) == 3 and parts[1] == "notin":
        inner = pieces(parts[2])
        return None if inner is None else _complement(inner)
    found: Pieces | None = _ALL
    names = symbols(parts[0::2])
    name = _variable(parts, names)
    if name is None:
        return None
    for index in range(0, len(parts) - 2, 2):
        step = _solve(parts[index], parts[index + 1], parts[index + 2], name)
        if step is None or found is None:
            return None
        found = step if found == _ALL else _intersect(found, step)
    return found


def _variable(parts: tuple[Any, ...], names: set[Any]) -> Any | None:
    if len(names) == 1:
        return next(iter(names))
    # Several symbols: the one that stands alone on a side is the unknown.
    alone = [p[1] for p in parts[0::2] if p[0] == "sym"]
    if len(alone) == 1:
        return alone[0]
    inner = [p for p in parts[0::2] if p[0] == "app"]
    return inner[0] if len(inner) == 1 and len(alone) == 0 else None


def _solve(left: Node, operator: str, right: Node, name: Any) -> Pieces | None:
    if operator not in _FLIP or operator == "=":
        return None
    if right[0] == "fn" and right[1] == "abs":
        left, right, operator = right, left, _FLIP[operator]
    if left[0] == "fn" and left[1] == "abs" and name not in symbols(right):
        return _solve_absolute(left[2][0], operator, right, name)
    if "infty" in repr((left, right)):
        return _ALL if operator in ("<", ">") and name in symbols((left, right)) else None
    gap: Node = ("add", (left, ("neg", right)))
    if name not in symbols(gap):
        return None
    zero, one, two = (substitute(gap, {name: ("num", Fraction(n))}) for n in (0, 1, 2))
    slope: Node = ("add", (one, ("neg", zero)))
    bend: Node = ("add", (two, ("neg", one), ("neg", one), zero))
    probe = substitute(gap, {name: ("num", Fraction(37, 11))})
    line: Node = ("add", (zero, ("mul", (("num", Fraction(37, 11)), slope)), ("neg", probe)))
    try:
        if not (is_zero(bend) and is_zero(line)):
            return None
    except UndecidedError:
        return None
    steep = approximate(slope)
    if steep is None or steep == 0:
        return None
    root = _root(zero, slope)
    if steep < 0:
        operator = _FLIP[operator]
    if operator == "ne":
        return (Piece(None, root, False, False), Piece(root, None, False, False))
    closed = operator in ("le", "ge")
    if operator in ("<", "le"):
        return (Piece(None, root, False, closed),)
    return (Piece(root, None, closed, False),)


def _root(zero: Node, slope: Node) -> Node:
    return ("neg", ("div", zero, slope))


def _solve_absolute(inner: Node, operator: str, bound: Node, name: Any) -> Pieces | None:
    size = approximate(bound)
    if size is None or size < 0 or operator == "ne":
        return None
    above = _solve(inner, operator, bound, name)
    below = _solve(inner, _FLIP[operator], ("neg", bound), name)
    if above is None or below is None:
        return None
    if operator in ("<", "le"):
        return _intersect(above, below)
    return _merge([*above, *below])


def _builder(node: Node) -> Pieces | None:
    item, condition = node[1], node[2]
    if item[0] == "rel" and len(item[1]) == 3 and item[1][1] == "in" and item[1][2] != ("std", "R"):
        return None
    name = item[1][0] if item[0] == "rel" else item
    if name[0] != "sym" or name[1] not in symbols(condition):
        return None
    return pieces(condition)
