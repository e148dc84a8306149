"""Arithmetic of small matrices, on trees."""

from __future__ import annotations

from fractions import Fraction

from .nodes import Node

Rows = tuple[tuple[Node, ...], ...]
_MAX_PRODUCT = 12
_MAX_DETERMINANT = 6


def rows_of(node: Node) -> Rows | None:
    """Return the entries of a matrix expression; None when it is none.

    Sums, differences, products, scalar multiples, whole powers and transposes of
    matrices are carried out on the entries, which stay trees.

    Args:
        node: Any tree.

    Returns:
        Rows of entries.
    """
    kind = node[0]
    if kind == "matrix":
        return node[1]
    if kind == "neg":
        inner = rows_of(node[1])
        return None if inner is None else _map(inner, lambda e: ("neg", e))
    if kind == "add":
        parts = [rows_of(term) for term in node[1]]
        if any(p is None for p in parts) or len({_shape(p) for p in parts if p}) != 1:
            return None
        filled = [p for p in parts if p is not None]
        return tuple(
            tuple(("add", tuple(p[r][c] for p in filled)) for c in range(len(filled[0][0])))
            for r in range(len(filled[0]))
        )
    if kind == "mul":
        return _product([*node[1]])
    if kind == "div":
        top = rows_of(node[1])
        return None if top is None else _map(top, lambda e: ("div", e, node[2]))
    if kind == "pow":
        base = rows_of(node[1])
        if base is None:
            return None
        if node[2] in (("sym", "T"), ("sym", "top"), ("sym", "t")):
            return tuple(zip(*base, strict=True))
        if node[2][0] == "num" and node[2][1].denominator == 1 and 1 <= node[2][1] <= 6:
            return _product([node[1]] * int(node[2][1]))
    return None


def _product(factors: list[Node]) -> Rows | None:
    result: Rows | None = None
    scale: list[Node] = []
    for factor in factors:
        rows = rows_of(factor)
        if rows is None:
            scale.append(factor)
        elif result is None:
            result = rows
        elif (
            len(result[0]) == len(rows)
            and max(len(result), len(rows), len(rows[0])) <= _MAX_PRODUCT
        ):
            result = tuple(
                tuple(
                    ("add", tuple(("mul", (row[k], rows[k][c])) for k in range(len(rows))))
                    for c in range(len(rows[0]))
                )
                for row in result
            )
        else:
            return None
    if result is None:
        return None
    return _map(result, lambda e: ("mul", (*scale, e))) if scale else result


def _map(rows: Rows, function) -> Rows:
    return tuple(tuple(function(entry) for entry in row) for row in rows)


def _shape(rows: Rows) -> tuple[int, int]:
    return len(rows), len(rows[0])


def determinant(node: Node) -> Node:
    """Return the determinant of a matrix expression as a tree.

    Raises:
        UnsupportedError: Not a square matrix, or too large a one.
    """
    from .evaluate import UnsupportedError

    rows = rows_of(node)
    if rows is None or len(rows) != len(rows[0]) or len(rows) > _MAX_DETERMINANT:
        raise UnsupportedError("det")
    return _expand(rows)


def _expand(rows: Rows) -> Node:
    if len(rows) == 1:
        return rows[0][0]
    terms: list[Node] = []
    for column, entry in enumerate(rows[0]):
        minor = tuple(row[:column] + row[column + 1 :] for row in rows[1:])
        term: Node = ("mul", (entry, _expand(minor)))
        terms.append(("neg", term) if column % 2 else term)
    return ("add", tuple(terms)) if terms else ("num", Fraction(0))
