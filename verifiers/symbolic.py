"""The last resort: sympy, on trees and never on text, in a process that can be killed.

Only expressions that the sampling of `equality` cannot evaluate come here:
integrals, limits, derivatives of bounds, infinite sums. sympy can take forever
on them, so it runs in a worker process only (`killable`); elsewhere `proves`
asks for isolation by raising.
"""

from __future__ import annotations

from typing import Any

from .equality import UndecidedError, approximate, symbols
from .nodes import Node
from .words import word_set

NEEDS_ISOLATION = "needs_isolation"

# Set by `worker.py`: whether this process is one that is killed when it takes too long.
killable = False

_MAX_NODES = 400
_NAMES = {
    "ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot",
    "arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh", "abs": "Abs", "ceil": "ceiling",
    "floor": "floor", "binom": "binomial",
}  # fmt: skip
_SAME_NAME = word_set("sin cos tan cot sec csc sinh cosh tanh exp factorial gcd lcm log")


def proves(a: Node, b: Node, reason: UndecidedError) -> bool:
    """Whether sympy finds two expressions equal.

    Args:
        a: An expression.
        b: Another.
        reason: Why sampling could not decide; raised again when sympy has
            nothing to add.

    Returns:
        True when their difference simplifies to zero, False when it is shown to
        be something else.

    Raises:
        UndecidedError: Not decided, or a worker process is needed.
    """
    if str(reason) != "unsupported" or not (_has_big(a) or _has_big(b)):
        raise reason
    if _size(a) + _size(b) > _MAX_NODES:
        raise UndecidedError("too_large")
    if not killable:
        raise UndecidedError(NEEDS_ISOLATION)
    import sympy

    try:
        gap = convert(a) - convert(b)
        value = sympy.simplify(gap.doit())
    except (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError) as error:
        raise UndecidedError("unsupported") from error
    if value.has(sympy.Integral, sympy.Limit, sympy.Sum, sympy.Product, sympy.nan):
        return _numerically(value)
    if value == 0:
        return True
    if value.free_symbols:
        return False
    return bool(abs(sympy.N(value, 40)) < sympy.Float(10) ** -30)


def _numerically(value: Any) -> bool:
    """A definite integral without closed form, by sympy's own quadrature."""
    import sympy

    if value.free_symbols or value.has(sympy.nan):
        raise UndecidedError("unsupported")
    number = sympy.N(value, 25)
    if not number.is_number or number.has(sympy.Integral, sympy.Sum):
        raise UndecidedError("unsupported")
    return bool(abs(number) < sympy.Float(10) ** -18)


def _has_big(node: Any) -> bool:
    return isinstance(node, tuple) and (node[:1] == ("big",) or any(map(_has_big, node)))


def _size(node: Any) -> int:
    return 1 + sum(map(_size, node)) if isinstance(node, tuple) else 0


def convert(node: Node) -> Any:
    """Return a tree as a sympy expression.

    Args:
        node: An expression.

    Raises:
        UndecidedError: sympy has no counterpart here, or a number is too large.
    """
    import sympy

    kind = node[0]
    if kind in ("num", "dec"):
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if kind == "sym":
        return sympy.Symbol(f"v_{node[1]}", real=True)
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infty": sympy.oo}[node[1]]
    if kind == "neg":
        return -convert(node[1])
    if kind == "add":
        return sympy.Add(*map(convert, node[1]))
    if kind == "mul":
        return sympy.Mul(*map(convert, node[1]))
    if kind == "div":
        return convert(node[1]) / convert(node[2])
    if kind == "pow":
        size = approximate(node[2])
        if size is not None and abs(size) > 200:
            raise UndecidedError("too_large")
        return convert(node[1]) ** convert(node[2])
    if kind == "pct":
        return convert(node[1]) / 100
    if kind == "deg":
        return convert(node[1]) * sympy.pi / 180
    if kind == "app" and len(node[2]) == 1:
        return convert(("sym", node[1])) * convert(node[2][0])
    if kind == "fn":
        return _function(node)
    if kind == "big":
        return _big(node)
    raise UndecidedError("unsupported")


def _function(node: Node) -> Any:
    import sympy

    name = node[1]
    if name in ("factorial", "binom"):
        size = approximate(node[2][0])
        if (size is None and not symbols(node[2])) or (size is not None and size > 500):
            raise UndecidedError("too_large")
    args = [convert(arg) for arg in node[2]]
    if name == "root":
        return sympy.real_root(args[0], args[1]) if len(args) == 2 else sympy.sqrt(args[0])
    found = _NAMES.get(name, name if name in _SAME_NAME else None)
    if found is None:
        raise UndecidedError("unsupported")
    return getattr(sympy, found)(*args)


def _big(node: Node) -> Any:
    import sympy

    _, kind, variable, low, high, body = node
    if kind == "int":
        if low is None or high is None:
            raise UndecidedError("unsupported")
        return sympy.Integral(
            convert(body), (convert(("sym", variable)), convert(low), convert(high))
        )
    if low is None or low[0] != "rel" or len(low[1]) != 3 or low[1][0][0] != "sym":
        raise UndecidedError("unsupported")
    name, operator, start = low[1]
    if kind == "lim" and operator == "to":
        return sympy.Limit(
            convert(body), convert(name), convert(start), dir="+-" if start[0] != "const" else "+"
        )
    if kind in ("sum", "prod") and operator == "=" and high is not None:
        index = sympy.Symbol(f"v_{name[1]}", integer=True)
        inner = convert(body).subs(convert(name), index)
        build = sympy.Sum if kind == "sum" else sympy.Product
        return build(inner, (index, convert(start), convert(high)))
    raise UndecidedError("unsupported")
