"""Equality of single values: numbers, expressions, quantities with units."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

from . import symbolic, units
from .equality import UndecidedError, approximate, equal, exact, substitute, symbols
from .nodes import Node

# How many significant digits make a decimal stand for an exact value.
ROUNDED_DIGITS = 3
RATIONAL_DIGITS = 4
IRRATIONAL_DIGITS = 6
_CONSTANTS = frozenset({"C", "c", "K", "k", "c_1", "c_2", "c_3", "C_1", "C_2", "C_3"})
_INTEGER_SETS = frozenset({"Z", "N", "Z+", "N+", "N*", "Z*", "N_+", "Z_+"})


class Decimal(NamedTuple):
    """A number written with a decimal point.

    Attributes:
        value: Its value.
        step: One unit of its last digit.
        digits: Its significant digits.
    """

    value: Fraction
    step: Fraction
    digits: int


def same(gold: Node, answer: Node) -> str | None:
    """Compare two values.

    Args:
        gold: The gold's tree.
        answer: The answer's tree.

    Returns:
        The rule under which they are the same; None when they are not.

    Raises:
        UndecidedError: No rule could tell.
    """
    value_a, unit_a = _measured(gold)
    value_b, unit_b = _measured(answer)
    if unit_a is None and unit_b is None:
        return _values(value_a, value_b)
    if unit_a is not None and unit_b is not None:
        if unit_a.percent and unit_b.percent:
            return _values(value_a, value_b)
        factor = units.compatible(unit_a, unit_b)
        if factor is None or unit_a.percent != unit_b.percent:
            return None
        return _values(value_a, _scaled(value_b, factor)) and "unit"
    return _half_measured(value_a, unit_a, value_b, unit_b)


def _half_measured(
    value_a: Node, unit_a: units.Unit | None, value_b: Node, unit_b: units.Unit | None
) -> str | None:
    """Compare a quantity with a plain value: the unit may go unsaid."""
    unit = unit_a if unit_a is not None else unit_b
    # Minutes of arc are never left unsaid: 7' is not 7.
    arc = unit is not None and unit.dimensions == (("deg", 1),) and unit.factor != 1
    plain = None if arc else _values(value_a, value_b)
    if plain:
        return "rounded" if plain == "rounded" else "unit_unsaid"
    if unit is None or arc:
        return None
    if unit.percent:
        part = Fraction(1, 100)
        if unit_a is not None:
            return _values(_scaled(value_a, part), value_b) and "percent"
        return _values(value_a, _scaled(value_b, part)) and "percent"
    if unit.dimensions == (("deg", 1),):
        if unit_a is not None:
            return _values(("deg", value_a), value_b) and "angle"
        return _values(value_a, ("deg", value_b)) and "angle"
    return None


def _measured(node: Node) -> tuple[Node, units.Unit | None]:
    if node[0] == "neg":
        value, unit = _measured(node[1])
        return ("neg", value), unit
    if node[0] == "pct":
        return node[1], units.resolve("percent")
    if node[0] == "deg":
        return node[1], units.resolve("degree")
    if node[0] != "qty":
        return node, None
    unit = units.resolve(node[2])
    value, inner = _measured(node[1])
    if inner is not None and inner.percent:
        unit = inner
    if unit.scale != 1:
        value = _scaled(value, unit.scale)
    return value, None if unit.bare and not unit.percent else unit


def _scaled(value: Node, factor: Fraction) -> Node:
    return value if factor == 1 else ("mul", (("num", factor), value))


def same_exactly(a: Node, b: Node) -> bool:
    """Whether two values are equal, without any policy of rounding or units."""
    return equal(a, b)


def is_known_zero(node: Node) -> bool:
    """Whether a value is exactly the number 0."""
    return exact(node) == 0


def _is_infinite(node: Any) -> bool:
    return isinstance(node, tuple) and (
        node == ("const", "infty") or (node[:1] != ("big",) and any(map(_is_infinite, node)))
    )


def _values(a: Node, b: Node) -> str | None:
    if _is_infinite(a) or _is_infinite(b):
        return None  # the same infinity is the same tree
    undecided: UndecidedError | None = None
    try:
        if equal(a, b):
            return "equal"
    except UndecidedError as error:
        undecided = error
    if symbols(a) or symbols(b):
        if _with_constants_renamed(a, b):
            return "constant_renamed"
    elif _rounds(a, b):
        return "rounded"
    if _has_plain_log(a) or _has_plain_log(b):
        try:
            if equal(_decadic(a), _decadic(b)):
                return "equal"
        except UndecidedError as error:
            undecided = error
    if undecided is not None:
        # Integrals, limits, infinite sums: only sympy can say.
        return "simplified" if symbolic.proves(a, b, undecided) else None
    return None


def decimal(node: Node) -> Decimal | None:
    """Read a number written with a decimal point or in scientific notation."""
    if node[0] == "neg":
        inner = decimal(node[1])
        return None if inner is None else inner._replace(value=-inner.value)
    if node[0] == "dec":
        step = Fraction(1, 10 ** node[2])
        return Decimal(node[1], step, len(str(abs(int(node[1] / step))).lstrip("0")))
    if node[0] == "mul" and len(node[1]) == 2 and node[1][1][0] == "pow":
        mantissa, power = decimal(node[1][0]), node[1][1]
        scale = exact(power)
        if mantissa is not None and scale is not None and power[1] == ("num", Fraction(10)):
            return Decimal(mantissa.value * scale, mantissa.step * scale, mantissa.digits)
    return None


def _rounds(gold: Node, answer: Node) -> bool:
    """Whether one side is the other, rounded as far as the policy allows.

    A decimal gold accepts what rounds to its digits. An exact gold accepts a
    decimal that is its correct rounding to enough digits: more for an irrational
    value than for a fraction, none for a fraction that ends.
    """
    shown, given = decimal(gold), decimal(answer)
    if shown is not None:
        if given is not None and given.step >= shown.step:
            return False
        return shown.digits >= ROUNDED_DIGITS and _within(answer, shown)
    if given is None:
        return False
    value = exact(gold)
    if value is not None:
        if _ends(value):
            return False
        return given.digits >= RATIONAL_DIGITS and _within(gold, given)
    return given.digits >= IRRATIONAL_DIGITS and _within(gold, given)


def _within(node: Node, rounded: Decimal) -> bool:
    half = rounded.step / 2
    value = exact(node)
    if value is not None:
        return abs(value - rounded.value) <= half
    near = approximate(node)
    if near is None or near in (math.inf, -math.inf):
        return False
    return abs(Fraction(near) - rounded.value) <= half * Fraction(1_000_000_001, 1_000_000_000)


def _ends(value: Fraction) -> bool:
    """Whether a fraction has a finite decimal expansion."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _with_constants_renamed(a: Node, b: Node) -> bool:
    """An arbitrary constant of integration may have another name."""
    extra_a, extra_b = symbols(a) - symbols(b), symbols(b) - symbols(a)
    if not extra_a or len(extra_a) != len(extra_b) or extra_a == symbols(a):
        return False
    if not (extra_a | extra_b) <= _CONSTANTS:
        return False
    pairs = zip(sorted(extra_b), sorted(extra_a), strict=True)
    renamed = substitute(b, {old: ("sym", new) for old, new in pairs})
    try:
        return equal(a, renamed)
    except UndecidedError:
        return False


def _has_plain_log(node: Any) -> bool:
    if not isinstance(node, tuple):
        return False
    if node[:2] == ("fn", "log") and len(node[2]) == 1:
        return True
    return any(_has_plain_log(part) for part in node)


def _decadic(node: Any) -> Any:
    if not isinstance(node, tuple):
        return node
    if node[:2] == ("fn", "log") and len(node[2]) == 1:
        return ("fn", "log", (_decadic(node[2][0]), ("num", Fraction(10))))
    return tuple(_decadic(part) for part in node)


def rename(node: Node, old: Any, new: Any) -> Node:
    """Return a tree with one symbol renamed."""
    if old is None or new is None:
        return node
    return substitute(node, {old: ("sym", new)})


def free_integer(condition: Node | None) -> Any | None:
    """Return the symbol that a condition declares to be an integer; else None."""
    if condition is None or condition[0] != "rel" or len(condition[1]) != 3:
        return None
    name, operator, domain = condition[1]
    if operator == "in" and name[0] == "sym" and domain[0] == "std" and domain[1] in _INTEGER_SETS:
        return name[1]
    return None
