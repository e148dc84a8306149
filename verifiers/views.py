"""Brings a tree into the form that is compared: signs expanded, names attached."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from .equality import UndecidedError, approximate, equal, symbols
from .nodes import Node
from .units import compound
from .words import word_set

_MAX_EXPANDED = 64
_FUNCTIONS_OF_ONE = word_set("sin cos tan cot sec csc abs norm arg Re Im deg det log ln")
_DIFFERENT = object()


class Named(NamedTuple):
    """A value with a name, such as x = 5 or f(x) = x + 1.

    Attributes:
        name: The tree of the left side.
        value: The tree of the right side.
        argument: The symbol in f(x), to rename it; None without one.
    """

    name: Node
    value: Node
    argument: str | None


def flatten(node: Node) -> Node:
    """Return the comparable form of a tree.

    Both values of a plus-minus become items of a list; `n = 1, 2, 3` names every
    item; `p = 5, q = 2; p = 7, q = 2` becomes a list of pairs; `k pi, k in Z`
    becomes a value with a condition; what follows an "about" sign is dropped.
    """
    kind = node[0]
    if kind == "list":
        return _flat_list(node)
    if kind == "set":
        items: list[Node] = []
        for item in node[1]:
            flat = flatten(item)
            items.extend(flat[1] if flat[0] == "list" and item[0] != "list" else [flat])
        return ("set", tuple(items))
    if kind == "cases" and all(len(row) == 1 for row in node[1]):
        return _flat_list(("list", tuple(row[0] for row in node[1]), frozenset({","})))
    if kind == "group" and len(node[3]) == 1 and node[3][0][0] == "qty":
        return node[3][0]
    if kind == "rel":
        node = _without_approximation(node)
        if node[0] != "rel":
            return flatten(node)
    found = variants(node)
    return found[0] if len(found) == 1 else ("list", tuple(found), frozenset({","}))


def _flat_list(node: Node) -> Node:
    items: list[Node] = []
    for item in node[1]:
        flat = flatten(item)
        items.extend(flat[1] if flat[0] == "list" and item[0] != "list" else [flat])
    if len(items) == 2 and node[2] == frozenset({"and"}):
        # "2 hours and 30 minutes" is one time, not two.
        joined = compound(items[0], items[1])
        if joined is not None:
            return joined
    items, conditions = _split_conditions(items)
    items = _inherit_names(items)
    items = _group_by_names(items)
    body: Node = items[0] if len(items) == 1 else ("list", tuple(items), node[2])
    for condition in conditions:
        body = ("cond", body, condition)
    return body


def _split_conditions(items: list[Node]) -> tuple[list[Node], list[Node]]:
    """Take memberships of symbols that other items use, such as k in Z."""
    kept, conditions = [], []
    for index, item in enumerate(items):
        declares = (
            index > 0
            and item[0] == "rel"
            and item[1][1] == "in"
            and item[1][0][0] == "sym"
            and item[1][2][0] == "std"
        )
        if declares and item[1][0][1] in symbols(tuple(items[:index] + items[index + 1 :])):
            conditions.append(item)
        else:
            kept.append(item)
    return kept, conditions


def _inherit_names(items: list[Node]) -> list[Node]:
    first = items[0]
    if first[0] != "rel" or len(first[1]) != 3 or first[1][1] not in ("=", "in"):
        return items
    if any(item[0] in ("rel", "cond") for item in items[1:]) or not is_name(first[1][0]):
        return items
    return [first, *(("rel", (first[1][0], "=", item)) for item in items[1:])]


def _group_by_names(items: list[Node]) -> list[Node]:
    found = [unname(item) for item in items]
    names = [f.name for f in found if isinstance(f, Named)]
    if len(names) != len(items):
        return items
    distinct = list(dict.fromkeys(names))
    size = len(distinct)
    if (
        size < 2
        or len(items) == size
        or len(items) % size
        or names != distinct * (len(items) // size)
    ):
        return items
    values = [f.value for f in found if isinstance(f, Named)]
    return [
        ("group", "(", ")", tuple(values[at : at + size])) for at in range(0, len(values), size)
    ]


def _without_approximation(node: Node) -> Node:
    """Drop "≈ 0.577" after an exact value; "x ≈ 11" is the value 11."""
    parts = node[1]
    if "approx" not in parts[1::2]:
        return node
    at = parts.index("approx")
    head = parts[:at]
    if len(head) == 1 and is_name(head[0]):
        parts = tuple("=" if p == "approx" else p for p in parts)
        return ("rel", parts[: 3 if "approx" in parts[3:] else len(parts)])
    return head[0] if len(head) == 1 else ("rel", head)


def variants(node: Node) -> list[Node]:
    """Return the values that the plus-minus signs of a tree stand for."""
    if not _has_sign(node):
        return [node]
    return [_choose(node, 1), _choose(node, -1)]


def _has_sign(node: Any) -> bool:
    if not isinstance(node, tuple):
        return False
    return node[:1] == ("pm",) or any(_has_sign(part) for part in node)


def _choose(node: Any, sign: int) -> Any:
    if not isinstance(node, tuple):
        return node
    if node[:1] == ("pm",):
        inner = _choose(node[2], sign)
        return inner if node[1] * sign > 0 else ("neg", inner)
    return tuple(_choose(part, sign) for part in node)


def unname(node: Node) -> Named | Node:
    """Split `x = 5` into name and value; return other trees, and values of chains.

    A chain of numbers, `2 + 3 = 5`, is the value 5 when it is true; when it is
    false it stays a relation, which equals no value.
    """
    if node[0] != "rel" or set(node[1][1::2]) != {"="}:
        return node
    parts = node[1][0::2]
    name, values = parts[0], parts[1:]
    if not is_name(name):
        if len(parts) == 2 and is_name(parts[1]) and not is_name(parts[0]):
            return Named(parts[1], parts[0], _argument(parts[1]))
        if symbols(name) and not _is_measure(name):
            return node
        values = parts
        name = ("sym", "")
    # A further name in the middle, y = k = 506.25, says nothing about the value.
    if not _agree(tuple(v for v in values[:-1] if not is_name(v)) + values[-1:]):
        return node
    value = values[-1]
    return value if name == ("sym", "") else Named(name, value, _argument(name))


def _agree(values: tuple[Node, ...]) -> bool:
    """Whether the links of a chain are equal, as far as that can be told."""
    last = values[-1]
    for value in values[:-1]:
        if value[0] in ("group", "set", "list", "matrix") or last[0] in ("group", "set", "list"):
            continue
        try:
            if not equal(value, last) and not _close(value, last):
                return False
        except UndecidedError:
            continue
    return True


def _close(a: Node, b: Node) -> bool:
    """A rounded last link, 246/595 = 0.4134, is no false equation."""
    if b[0] != "dec":
        return False
    exact = approximate(a)
    return exact is not None and abs(exact - float(b[1])) <= 0.51 * 10.0 ** -b[2]


def is_name(node: Node) -> bool:
    """Whether a tree names something: x, a_3, f(x), AB, |AB|, (x, y), NO/BO."""
    kind = node[0]
    if kind == "sym":
        return True
    if kind == "app":
        return True
    if kind == "const":
        return node[1] in ("e", "i")
    if kind == "mul":
        return all(_is_point(f) for f in node[1]) or _is_inverse(node[1])
    if kind == "div" and all(_is_differential(part) for part in node[1:]):
        return True
    if kind in ("div", "ratio"):
        parts = node[1:] if kind == "div" else node[1]
        return all(is_name(p) for p in parts) and any(
            p[0] != "sym" or p[1][0].isupper() or "_" in p[1] for p in parts
        )
    if kind == "group":
        return all(is_name(item) for item in node[3])
    if kind == "fn" and node[1] in _FUNCTIONS_OF_ONE and len(node[2]) == 1:
        return is_name(node[2][0]) and node[2][0][0] != "const"
    return False


def _is_inverse(factors: tuple[Node, ...]) -> bool:
    """f^{-1}(x), which reads as a product."""
    minus_one = (("neg", ("num", Fraction(1))), ("num", Fraction(-1)))
    first = factors[0]
    return (
        len(factors) == 2
        and first[0] == "pow"
        and first[1][0] == "sym"
        and first[2] in minus_one
        and factors[1][0] == "sym"
    )


def _is_differential(node: Node) -> bool:
    """The dy and dx of dy/dx."""
    return node[0] == "mul" and len(node[1]) == 2 and node[1][0] == ("sym", "d")


def _is_point(factor: Node) -> bool:
    return factor[0] == "sym" and (factor[1][0].isupper() or factor[1] in ("angle", "triangle"))


def _is_measure(node: Node) -> bool:
    return node[0] in ("big",)


def _argument(name: Node) -> str | None:
    if name[0] == "app" and len(name[2]) == 1 and name[2][0][0] == "sym":
        return name[2][0][1]
    return None


def names_match(a: Node, b: Node) -> bool:
    """Whether two left sides may name the same thing."""
    if a == b or sorted(map(repr, _factors(a))) == sorted(map(repr, _factors(b))):
        return True
    return _is_function(a) and _is_function(b)


def _factors(node: Node) -> tuple[Node, ...]:
    return node[1] if node[0] == "mul" else (node,)


def _is_function(name: Node) -> bool:
    return name[0] == "app" or name == ("sym", "y")
