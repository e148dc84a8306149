"""Whether two read answers are the same answer, kind by kind.

Equality of values is symmetric. One policy is not, by its nature: an answer is
also accepted when it rounds to the digits that a decimal gold shows (`rounded`).
"""

from __future__ import annotations

from typing import Any

from . import realset, scalars
from .budget import check
from .equality import UndecidedError, constant_ratio, is_zero, symbols
from .matrices import Rows, rows_of
from .nodes import Node
from .views import Named, flatten, names_match, unname
from .words import word_set

_STRUCTURES = word_set(
    "group set list setop std builder rel matrix cond cases ratio text word clock date choice"
)
_INEQUALITIES = frozenset({"<", ">", "le", "ge", "ne"})
_REVERSED = {">": "<", "ge": "le"}
_MAX_MATCHING = 400
_MAX_PAIRWISE = 24
CHOICES = frozenset("ABCDEFGHIJ")


def matches(gold: Node, answer: Node) -> str | None:
    """Compare two answers.

    Args:
        gold: The gold's tree.
        answer: The answer's tree.

    Returns:
        The name of the rule under which they are the same; None when they are
        not.

    Raises:
        UndecidedError: No rule could tell.
    """
    if gold == answer:
        return "same_form"
    first, second = flatten(gold), flatten(answer)
    if first == second:
        return "same_form"
    return _same(first, second)


def _same(a: Node, b: Node) -> str | None:
    check()
    if a == b:
        return "same_form"
    equations = _equations(a, b)
    if equations is not None:
        return equations or None
    left, right = unname(a), unname(b)
    if isinstance(left, Named) or isinstance(right, Named):
        return _named(left, right)
    if left is not a or right is not b:  # a true chain of numbers is its value
        return _same(left, right)
    chosen, wanted = _letters(b), _letters(a)
    if chosen is not None and wanted is not None and "list" in (a[0], b[0]):
        return "choice" if chosen == wanted else None
    for kind in ("word", "text", "clock", "date", "choice"):
        if kind in (a[0], b[0]):
            return _worded(a, b)
    if a[0] == "cond" or b[0] == "cond":
        return _conditional(a, b)
    if a[0] == "ratio" or b[0] == "ratio":
        return _ratios(a, b)
    if a[0] == "list" or b[0] == "list":
        return _lists(a, b)
    if rows_of(a) is not None or rows_of(b) is not None:
        return _matrices(a, b)
    if _is_set(a) or _is_set(b):
        return _sets(a, b)
    if a[0] == "group" or b[0] == "group":
        return _tuples(a, b)
    if a[0] == "rel" or b[0] == "rel":
        return _chains(a, b)
    if a[0] in _STRUCTURES or b[0] in _STRUCTURES:
        return None
    if a[0] == b[0] == "sym" and a[1].upper() == b[1].upper() and a[1].upper() in CHOICES:
        return "choice"
    return scalars.same(a, b)


def _equations(a: Node, b: Node) -> str | None:
    """Compare two equations as the curves they describe; None when not that case."""
    if not (_is_equation(a) and _is_equation(b)):
        return None
    left, right = unname(a), unname(b)
    if isinstance(left, Named) and isinstance(right, Named) and left.name == right.name:
        return None
    f: Node = ("add", (a[1][0], ("neg", a[1][2])))
    g: Node = ("add", (b[1][0], ("neg", b[1][2])))
    if isinstance(left, Named) and isinstance(right, Named):
        # x = 7 and y = 7 are different; y = 2x and f(x) = 2x are not.
        if not names_match(left.name, right.name):
            if symbols(f) != symbols(g):
                return ""
        else:
            return None
    try:
        if is_zero(f) or is_zero(g):
            return "equation" if is_zero(f) and is_zero(g) else ""
        if constant_ratio(f, g):
            return "equation"
    except UndecidedError:
        return ""
    if isinstance(left, Named) and isinstance(right, Named):
        return None if names_match(left.name, right.name) else ""
    return ""


def _is_equation(node: Node) -> bool:
    return (
        node[0] == "rel"
        and len(node[1]) == 3
        and node[1][1] == "="
        and all(
            side[0] not in _STRUCTURES and side[0] != "qty" for side in (node[1][0], node[1][2])
        )
    )


def _named(a: Named | Node, b: Named | Node) -> str | None:
    if isinstance(a, Named) and isinstance(b, Named):
        if not names_match(a.name, b.name):
            return None
        value = (
            b.value if a.argument == b.argument else scalars.rename(b.value, b.argument, a.argument)
        )
        return _same(a.value, value)
    left = a.value if isinstance(a, Named) else a
    right = b.value if isinstance(b, Named) else b
    rule = _same(left, right)
    return rule and (rule if rule == "rounded" else "value_of_name")


def _worded(a: Node, b: Node) -> str | None:
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


def _letters(node: Node) -> list[str] | None:
    """The letters of a choice of several: AC, or A and C; None for anything else."""
    parts = node[1] if node[0] in ("mul", "list", "set") else (node,)
    if all(part[0] == "sym" and part[1] in CHOICES for part in parts):
        return sorted(part[1] for part in parts)
    return None


def _conditional(a: Node, b: Node) -> str | None:
    """Compare values with side conditions; a free integer may be renamed."""
    body_a, condition_a = (a[1], a[2]) if a[0] == "cond" else (a, None)
    body_b, condition_b = (b[1], b[2]) if b[0] == "cond" else (b, None)
    integer_a, integer_b = scalars.free_integer(condition_a), scalars.free_integer(condition_b)
    if (condition_a is not None and integer_a is None) or (
        condition_b is not None and integer_b is None
    ):
        if condition_a is None or condition_b is None:
            return None
        both = _same(body_a, body_b)
        return both if both and _same(condition_a, condition_b) else None
    rule = _same(body_a, body_b)
    if rule:
        return rule
    extra_a = symbols(body_a) - symbols(body_b)
    extra_b = symbols(body_b) - symbols(body_a)
    if len(extra_a) == len(extra_b) == 1:
        return _same(body_a, scalars.rename(body_b, extra_b.pop(), extra_a.pop())) and "renamed"
    return None


def _ratios(a: Node, b: Node) -> str | None:
    if a[0] == b[0] == "ratio":
        if len(a[1]) != len(b[1]):
            return None
        first = all(scalars.same_exactly(x, y) for x, y in zip(a[1], b[1], strict=True))
        cross = all(
            scalars.same_exactly(("mul", (a[1][0], y)), ("mul", (b[1][0], x)))
            for x, y in zip(a[1][1:], b[1][1:], strict=True)
        )
        zero = any(scalars.is_known_zero(x) for x in (*a[1], *b[1]))
        return "ratio" if first or (cross and not zero) else None
    ratio, other = (a, b) if a[0] == "ratio" else (b, a)
    if len(ratio[1]) != 2 or other[0] in _STRUCTURES or other[0] == "qty":
        return None
    return "ratio" if scalars.same_exactly(("div", ratio[1][0], ratio[1][1]), other) else None


def _items(node: Node) -> tuple[Node, ...]:
    if node[0] == "group":
        return node[3]
    return node[1] if node[0] in ("list", "set") else (node,)


def _lists(a: Node, b: Node) -> str | None:
    """Compare enumerations: unordered, except against an ordered tuple."""
    if a[0] == b[0] == "list" or {a[0], b[0]} == {"list", "rel"}:
        found = _as_real_sets(a, b)
        if found is not None:
            return found
    first, second = _items(a), _items(b)
    if len(first) != len(second):
        # Said twice is said once.
        first, second = tuple(dict.fromkeys(first)), tuple(dict.fromkeys(second))
    if len(first) == len(second) == 1:
        return _same(first[0], second[0])
    if len(first) != len(second):
        return _as_real_sets(a, b) or None
    if "group" in (a[0], b[0]):
        kinds = {(n[1], n[2]) for n in (a, b) if n[0] == "group"}
        return _in_order(first, second) if kinds <= {("(", ")"), ("[", "]")} else None
    names = [_name_of(item) for item in (*first, *second)]
    half = len(first)
    if any(names[:half]) != any(names[half:]) and len({n for n in names if n}) > 1:
        # "x = 1, y = 2" against "1, 2": the order says which is which.
        return _in_order(tuple(map(_bare, first)), tuple(map(_bare, second)))
    return _any_order(first, second)


def _name_of(item: Node) -> Any:
    found = unname(item)
    return found.name if isinstance(found, Named) else None


def _bare(item: Node) -> Node:
    found = unname(item)
    return found.value if isinstance(found, Named) else item


def _as_real_sets(a: Node, b: Node) -> str | None:
    if not any(p[0] == "rel" and set(p[1][1::2]) & _INEQUALITIES for p in (*_items(a), *_items(b))):
        return None
    first, second = realset.pieces(a), realset.pieces(b)
    if first is None or second is None:
        return None
    return "real_set" if realset.same(first, second) else None


def _in_order(first: tuple[Node, ...], second: tuple[Node, ...]) -> str | None:
    if len(first) != len(second):
        return None
    rules = set()
    for x, y in zip(first, second, strict=True):
        rule = _same(x, y)
        if not rule:
            return None
        rules.add(rule)
    return "rounded" if "rounded" in rules else "elementwise"


def _any_order(first: tuple[Node, ...], second: tuple[Node, ...]) -> str | None:
    """Match each item of one side with its own item of the other."""
    if len(first) != len(second) or len(first) > _MAX_MATCHING:
        return None
    left = list(second)
    rules = set()
    for x in first:
        # The same tree first, so that long lists stay linear in comparisons.
        place = left.index(x) if x in left else None
        rule: str | None = "same_form"
        if place is None:
            tried = ((index, _same(x, y)) for index, y in enumerate(left))
            place, rule = next(((index, found) for index, found in tried if found), (None, None))
        if place is None or rule is None:
            return None
        rules.add(rule)
        del left[place]
    return "rounded" if "rounded" in rules else "unordered"


def _matrices(a: Node, b: Node) -> str | None:
    first, second = rows_of(a), rows_of(b)
    if first is not None and second is not None:
        if (len(first), len(first[0])) != (len(second), len(second[0])):
            return None
        return _in_order(_entries(first), _entries(second))
    rows, other = (first, b) if first is not None else (second, a)
    if rows is None:
        return None
    if len(rows) == len(rows[0]) == 1 and other[0] not in _STRUCTURES:
        return _same(rows[0][0], other)
    # A column or row of coordinates is the point with these coordinates.
    if other[0] == "group" and (len(rows) == 1 or len(rows[0]) == 1):
        entries = _entries(rows)
        return _in_order(entries, other[3]) if other is b else _in_order(other[3], entries)
    return None


def _entries(rows: Rows) -> tuple[Node, ...]:
    return tuple(entry for row in rows for entry in row)


def _is_set(node: Node) -> bool:
    if node[0] in ("set", "setop", "std", "builder"):
        return True
    return node[0] == "rel" and bool(set(node[1][1::2]) & (_INEQUALITIES | {"in", "notin"}))


def _sets(a: Node, b: Node) -> str | None:
    if a[0] == b[0] == "rel" and symbols(a) != symbols(b):
        return None  # x > 3 and y > 3 say different things
    a, b = _member(a), _member(b)
    if a[0] == b[0] == "set":
        first, second = _distinct(a[1]), _distinct(b[1])
        return _any_order(first, second) and "set"
    if a[0] == b[0] == "rel":
        rule = _chains(a, b)
        if rule:
            return rule
    if a[0] == b[0] == "builder" and _same_builder(a, b):
        return "set_builder"
    for one, other in ((a, b), (b, a)):
        if one[0] == "set" and other[0] == "group":
            return _in_order(_items(a), _items(b))
        if one[0] == "set" and len(one[1]) == 1 and other[0] not in _STRUCTURES:
            return _same(_items(a)[0], _items(b)[0])
    if a[0] not in _STRUCTURES or b[0] not in _STRUCTURES:
        return None
    first, second = realset.pieces(a), realset.pieces(b)
    if first is None or second is None:
        return "set" if a == b else None
    return "real_set" if realset.same(first, second) else None


def _member(node: Node) -> Node:
    if node[0] == "rel" and len(node[1]) == 3 and node[1][1] == "in":
        return node[1][2]
    return node


def _distinct(items: tuple[Node, ...]) -> tuple[Node, ...]:
    if len(items) > _MAX_PAIRWISE:
        return tuple(dict.fromkeys(items))
    kept: list[Node] = []
    for item in items:
        if item not in kept and not any(_safe_same(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


def _safe_same(a: Node, b: Node) -> bool:
    try:
        return bool(_same(a, b)) and _same(a, b) != "rounded"
    except UndecidedError:
        return False


def _same_builder(a: Node, b: Node) -> bool:
    extra_a, extra_b = symbols(a) - symbols(b), symbols(b) - symbols(a)
    if len(extra_a) == len(extra_b) == 1:
        b = scalars.rename(b, extra_b.pop(), extra_a.pop())
    item_a, item_b = _member_name(a[1]), _member_name(b[1])
    return bool(_same(item_a, item_b)) and bool(_same(flatten(a[2]), flatten(b[2])))


def _member_name(item: Node) -> Node:
    return item[1][0] if item[0] == "rel" else item


def _tuples(a: Node, b: Node) -> str | None:
    if a[0] == b[0] == "group":
        if (a[1], a[2]) != (b[1], b[2]):
            return None
        if len(a[3]) == 2 and any("infty" in repr(n) for n in (a[3], b[3])):
            first, second = realset.pieces(a), realset.pieces(b)
            if first is not None and second is not None:
                return "interval" if realset.same(first, second) else None
        return _in_order(a[3], b[3])
    group = a if a[0] == "group" else b
    if len(group[3]) == 1:
        return _same(a[3][0] if a is group else a, b[3][0] if b is group else b)
    return None


def _chains(a: Node, b: Node) -> str | None:
    """Compare relations that are no equations of curves: a < b < c."""
    if a[0] != "rel" or b[0] != "rel":
        return None
    first, second = _ascending(a[1]), _ascending(b[1])
    if first[1::2] == second[1::2] and len(first) == len(second):
        rule = _in_order(first[0::2], second[0::2])
        if rule:
            return "relation"
        if len(first) == 3 and first[1] in ("=", "ne", "equiv"):
            rule = _in_order(first[0::2], second[2::-2])
            if rule:
                return "relation"
        if len(first) == 3 and first[1] in ("<", "le", "ne"):
            f: Node = ("add", (first[0], ("neg", first[2])))
            g: Node = ("add", (second[0], ("neg", second[2])))
            sign = constant_ratio(f, g)
            return "relation" if sign == 1 or (sign and first[1] == "ne") else None
    return None


def _ascending(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    operators = parts[1::2]
    if all(op in _REVERSED for op in operators):
        turned = list(reversed(parts))
        turned[1::2] = [_REVERSED[op] for op in turned[1::2]]
        return tuple(turned)
    return parts
