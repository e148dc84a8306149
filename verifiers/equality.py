"""Whether two expressions are equal: exact where possible, then seeded sampling.

In this order: the same tree; exact rationals; identity of rational functions
modulo a prime at seeded points; floats at seeded points, which tell most
different expressions apart; many digits at seeded points. Only what none of
these can evaluate (integrals, limits, infinite sums) goes to sympy's simplify.
Equality is symmetric: every step treats both sides alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from .budget import check
from .evaluate import (
    MAX_FACTORIAL,
    Complex,
    Real,
    TooLargeError,
    UndefinedError,
    UnsupportedError,
)
from .exact import PRIME, Exact, Residue
from .nodes import Node
from .precise import agree

_ZERO: Node = ("num", Fraction(0))
_RELATIVE = 1e-9


class UndecidedError(Exception):
    """No step could decide; the reason is `too_large` or `unsupported`."""


def symbols(node: Any) -> set[Any]:
    """Return the names of an expression's symbols, and its unknown applications."""
    found: set[Any] = set()
    _gather(node, found)
    return found


def _gather(node: Any, found: set[Any]) -> None:
    if not isinstance(node, tuple) or not node:
        return
    if node[0] == "sym":
        found.add(node[1])
        return
    if node[0] == "big" and node[3] is not None and node[3][0] == "rel":
        inner: set[Any] = set()
        _gather(node[5], inner)
        _gather(node[3][1][2], found)
        _gather(node[4], found)
        found |= inner - {node[3][1][0][-1]}
        return
    if node[0] == "app":
        if node[1] in ("f", "g", "h", "F", "G", "H") or len(node[2]) != 1:
            found.add(node)
        else:
            found.add(node[1])
            _gather(node[2], found)
        return
    for part in node[1:] if isinstance(node[0], str) else node:
        _gather(part, found)


def exact(node: Node) -> Fraction | None:
    """Return the value of an expression when it is a rational; None when not known to be."""
    try:
        return Exact().value(node)
    except ArithmeticError:
        return None


def approximate(node: Node) -> float | None:
    """Return the real value of a constant expression; None when it has none."""
    value = exact(node)
    try:
        return float(value) if value is not None else float(Real().value(node))
    except (ArithmeticError, TypeError):
        return None


def equal(a: Node, b: Node) -> bool:
    """Decide whether two expressions are equal.

    Args:
        a: An expression.
        b: Another.

    Returns:
        Whether they are equal.

    Raises:
        UndecidedError: No step could tell.
    """
    check()
    if a == b:
        return True
    names = sorted(symbols(a) | symbols(b), key=repr)
    if not names:
        first, second = exact(a), exact(b)
        if first is not None and second is not None:
            return first == second
    decided = _by_residues(a, b, names)
    if decided is not None:
        return decided
    decided = _by_floats(a, b, names)
    if decided is not None:
        return decided
    return _by_digits(a, b, names)


def is_zero(node: Node) -> bool:
    """Whether an expression is identically zero; see `equal`."""
    return equal(node, _ZERO)


def _seeded(names: list[Any]) -> random.Random:
    return random.Random(f"boxed {names!r}")  # noqa: S311 -- points of evaluation, not secrets


def _by_residues(a: Node, b: Node, names: list[Any]) -> bool | None:
    points = _seeded(names)
    agreed = 0
    for _ in range(6):
        env = {name: points.randrange(2, PRIME - 1) for name in names}
        try:
            if Residue(env).value(a) != Residue(env).value(b):
                return False
        except UndefinedError:
            continue
        except (ArithmeticError, ValueError):
            return None
        agreed += 1
        if agreed == (3 if names else 1):
            return True
    return None


_STEPS = frozenset({"floor", "ceil", "mod", "sgn", "gcd", "lcm"})


def _points(names: list[Any], *, steps: bool = False) -> Iterator[tuple[dict[Any, Fraction], str]]:
    """Seeded points: near and far, both signs, and whole numbers.

    Expressions with steps, such as floor(sqrt(n - 1)), may differ at few whole
    numbers only: they see more of them, those of a single symbol without a gap.
    """
    points = _seeded(names)
    scales = (("real", 1, 9), ("real", 11, 97), ("real", 1, 97), ("negative", 1, 9))
    for round_number in range(3):
        for mode, low, high in scales:
            sign = -1 if mode == "negative" else 1
            env = {
                name: Fraction(sign * points.randrange(low * 1009, high * 1009), 1009 * 7)
                for name in names
            }
            if mode == "negative" and round_number:
                env = {name: value * points.choice((1, -1)) for name, value in env.items()}
            yield env, mode
    for _ in range(8):
        yield {name: Fraction(points.randrange(1, 13)) for name in names}, "whole"
    for whole in range(60 if steps else 0):
        if len(names) == 1:
            yield {names[0]: Fraction(whole)}, "step"
        else:
            yield {name: Fraction(points.randrange(0, 40)) for name in names}, "step"


def _differ(a: Node, b: Node, env: dict[Any, Fraction], imaginary: bool) -> bool:
    """Whether many digits, too, tell the two apart at a point: a float may fall below a step."""
    try:
        return not agree(a, b, env, imaginary=imaginary)
    except (ArithmeticError, ValueError, TypeError):
        return False


def _has_steps(node: Any) -> bool:
    """Whether a value may jump: floor and its kin occur."""
    if not isinstance(node, tuple):
        return False
    return (node[:1] == ("fn",) and node[1] in _STEPS) or any(map(_has_steps, node))


def _uses_i(node: Any) -> bool:
    if node == ("const", "i"):
        return True
    return isinstance(node, tuple) and any(_uses_i(part) for part in node)


def _by_floats(a: Node, b: Node, names: list[Any]) -> bool | None:
    """False when floats tell the two apart; None when they agree or cannot say."""
    complexly = _uses_i(a) or _uses_i(b)
    stepped = _has_steps(a) or _has_steps(b)
    for env, mode in _points(names, steps=stepped) if names else [({}, "real")]:
        floats = {name: float(value) for name, value in env.items()}
        backend: Real = Complex(floats) if complexly else Real(floats)
        try:
            first, second = backend.value(a), backend.value(b)
        except (ArithmeticError, ValueError, TypeError, AttributeError):
            continue
        gap = abs(first - second)
        if mode == "step" and gap > 0.5 and _differ(a, b, env, complexly):
            return False
        if gap > _RELATIVE * max(backend.largest, 1.0) and gap > _RELATIVE * max(
            abs(first), abs(second)
        ):
            return False
    return None


def _by_digits(a: Node, b: Node, names: list[Any]) -> bool:
    complexly = _uses_i(a) or _uses_i(b)
    reasons: set[str] = set()
    counted = 0
    if not names:
        for imaginary in (False, True) if not complexly else (True,):
            try:
                return agree(a, b, {}, imaginary=imaginary)
            except TooLargeError as error:
                if _enormous(a) != _enormous(b) and (_has_value(a) or _has_value(b)):
                    return False
                raise UndecidedError("too_large") from error
            except UndefinedError:
                continue
            except (ArithmeticError, ValueError, TypeError) as error:
                raise UndecidedError("unsupported") from error
        if _has_value(a) != _has_value(b):
            return False
        raise UndecidedError("undefined")
    for env, mode in _points(names):
        if mode == "whole" and counted >= 3:
            break
        try:
            if not agree(a, b, env, imaginary=complexly):
                return False
            counted += 1
        except ArithmeticError as error:
            reasons.add(type(error).__name__)
            if isinstance(error, UnsupportedError):
                break
        except (ValueError, TypeError):
            reasons.add("ValueError")
    if counted >= 3:
        return True
    if not complexly and "UnsupportedError" not in reasons:
        return _by_complex_points(a, b, names)
    raise UndecidedError("unsupported" if "UnsupportedError" in reasons else "too_large")


def _has_value(node: Node) -> bool:
    """Whether a constant expression has a value within the limits, real or complex."""
    try:
        return agree(node, node, {}, imaginary=True)
    except (ArithmeticError, ValueError, TypeError):
        return False


def _enormous(node: Node) -> bool:
    """Whether a constant is larger than anything within the limits: 9^(9^9), (2000!)!.

    Only forms that cannot cancel count, so that a difference of towers does not.
    """
    if node[0] == "neg":
        return _enormous(node[1])
    if node[0] == "fn" and node[1] == "factorial":
        inner = exact(node[2][0])
        return _enormous(node[2][0]) or (inner is not None and inner > MAX_FACTORIAL)
    if node[0] == "pow":
        base, power = exact(node[1]), exact(node[2])
        growing = power is not None and power > 1
        if base is None:
            return _enormous(node[1]) and (growing or _enormous(node[2]))
        return base >= 2 and (_enormous(node[2]) or (power is not None and power > 1 << 22))
    if node[0] == "mul":
        sizes = [exact(factor) for factor in node[1]]
        rest = [f for f, size in zip(node[1], sizes, strict=True) if size is None or abs(size) < 1]
        return bool(rest) and all(map(_enormous, rest))
    return False


def _by_complex_points(a: Node, b: Node, names: list[Any]) -> bool:
    """Agreement on principal branches, for expressions that are real nowhere sampled."""
    counted = 0
    for env, _ in _points(names):
        try:
            if not agree(a, b, env, imaginary=True):
                return False
            counted += 1
        except (ArithmeticError, ValueError, TypeError):
            continue
        if counted >= 4:
            return True
    raise UndecidedError("undefined")


def constant_ratio(a: Node, b: Node) -> int:
    """The sign of the constant k with a = k b; 0 when there is none.

    Args:
        a: An expression that is not identically zero.
        b: Another.

    Returns:
        1 or -1 when a is that multiple of b for all values, else 0.

    Raises:
        UndecidedError: The ratio cannot be evaluated.
    """
    names = sorted(symbols(a) | symbols(b), key=repr)
    for env, _ in _points(names):
        point = {name: ("num", value) for name, value in env.items()}
        try:
            at_a = Real({n: float(v) for n, v in env.items()}).value(a)
            at_b = Real({n: float(v) for n, v in env.items()}).value(b)
        except (ArithmeticError, ValueError, TypeError):
            continue
        if abs(at_a) < 1e-12 or abs(at_b) < 1e-12:
            continue
        # a(x) b(p) = a(p) b(x) for all x, with p this point.
        here_a, here_b = substitute(a, point), substitute(b, point)
        if equal(("mul", (a, here_b)), ("mul", (here_a, b))):
            return 1 if (at_a > 0) == (at_b > 0) else -1
        return 0
    return 0


def substitute(node: Any, values: dict[Any, Node]) -> Any:
    """Return a tree with symbols replaced by trees."""
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] == "sym":
        return values.get(node[1], node)
    if node in values:
        return values[node]
    if node[0] == "app" and node[1] in values and len(node[2]) == 1:
        return ("mul", (values[node[1]], substitute(node[2][0], values)))
    return tuple(substitute(part, values) for part in node)


__all__ = [
    "UndecidedError",
    "approximate",
    "constant_ratio",
    "equal",
    "exact",
    "is_zero",
    "substitute",
    "symbols",
]
