"""Values of expression trees: exact, modulo a prime, in floats, in many digits.

Each backend walks the same tree. None of them runs text, and each bounds its
work before doing it: powers, factorials and sums beyond the limits are
`TooLargeError`, never computed.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .budget import check
from .nodes import Node

MAX_BITS = 60_000
MAX_FACTORIAL = 2_000
MAX_TERMS = 1_500
MAX_STEPS = 60_000


class UndefinedError(ArithmeticError):
    """No value here: a division by zero, a logarithm of zero, a pole."""


class UnsupportedError(ArithmeticError):
    """This backend has no rule for the node."""


class TooLargeError(ArithmeticError):
    """The value would be too large, or the work too much."""


class Backend:
    """Walks a tree; subclasses say what numbers and functions are.

    Args:
        env: Values of symbols, in the numbers of the backend.
    """

    def __init__(self, env: Mapping[Any, Any] | None = None) -> None:
        """Start with no work done."""
        self.env = dict(env or {})
        self.steps = 0

    def value(self, node: Node) -> Any:
        """Return the value of an expression.

        Raises:
            UndefinedError: It has none.
            UnsupportedError: It is not an expression of this backend.
            TooLargeError: It is beyond the limits.
        """
        self.steps += 1
        if not self.steps & 127:
            check()
            if self.steps > MAX_STEPS:
                raise TooLargeError("too many steps")
        kind = node[0]
        if kind == "num" or kind == "dec":
            return self.number(node[1])
        if kind == "sym":
            return self.symbol(node[1])
        if kind == "const":
            return self.constant(node[1])
        if kind == "add":
            total = self.value(node[1][0])
            for term in node[1][1:]:
                total = self.add(total, self.value(term))
            return total
        if kind == "mul":
            total = self.value(node[1][0])
            for factor in node[1][1:]:
                total = self.multiply(total, self.value(factor))
            return total
        if kind == "div":
            return self.divide(self.value(node[1]), self.value(node[2]))
        if kind == "neg":
            return self.negate(self.value(node[1]))
        if kind == "pow":
            return self.power(node)
        if kind == "fn":
            return self.call(node)
        if kind == "pct":
            return self.divide(self.value(node[1]), self.number(Fraction(100)))
        if kind == "deg":
            angle = self.multiply(self.value(node[1]), self.constant("pi"))
            return self.divide(angle, self.number(Fraction(180)))
        if kind == "app":
            return self.application(node)
        if kind == "based":
            return self.number(in_base(node))
        if kind == "big":
            return self.big(node)
        raise UnsupportedError(kind)

    def number(self, value: Fraction) -> Any:
        """Return a rational as a number of the backend."""
        raise UnsupportedError("number")

    def constant(self, name: str) -> Any:
        """Return pi, e, i or infinity."""
        raise UnsupportedError(name)

    def symbol(self, name: Any) -> Any:
        """Return the value of a symbol."""
        if name not in self.env:
            raise UnsupportedError(f"symbol {name}")
        return self.env[name]

    def application(self, node: Node) -> Any:
        """Return f(x) for an unknown f, or the product that k(x) is."""
        name, args = node[1], node[2]
        if node in self.env:
            return self.env[node]
        if name in self.env and len(args) == 1:
            return self.multiply(self.env[name], self.value(args[0]))
        raise UnsupportedError(f"function {name}")

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""
        return a + b

    def multiply(self, a: Any, b: Any) -> Any:
        """Return a b."""
        return a * b

    def negate(self, a: Any) -> Any:
        """Return -a."""
        return -a

    def divide(self, a: Any, b: Any) -> Any:
        """Return a / b."""
        if b == 0:
            raise UndefinedError("division by zero")
        return a / b

    def power(self, node: Node) -> Any:
        """Return a power."""
        raise UnsupportedError("pow")

    def call(self, node: Node) -> Any:
        """Return the value of a named function."""
        raise UnsupportedError(node[1])

    def integer(self, node: Node) -> int:
        """Return the value of a node that must be a machine-sized integer."""
        from .exact import Exact

        try:
            value = Exact(self._rational_env()).value(node)
        except UnsupportedError as error:
            names = symbolic_names(node)
            if names and names <= set(self.env):
                raise UndefinedError("a bound that is no integer") from error
            raise
        if value.denominator != 1:
            raise UndefinedError("not an integer")
        return int(value)

    def _rational_env(self) -> dict[Any, Fraction]:
        out = {}
        for name, value in self.env.items():
            if isinstance(value, Fraction):
                out[name] = value
            elif isinstance(value, (int, float)) and value == int(value):
                out[name] = Fraction(int(value))
        return out

    def big(self, node: Node) -> Any:
        """Return a finite sum or product; other operators have no rule here."""
        _, kind, _, low, high, body = node
        if kind not in ("sum", "prod") or low is None or high is None or low[0] != "rel":
            raise UnsupportedError(kind)
        if len(low[1]) != 3 or low[1][1] != "=":
            raise UnsupportedError(kind)
        variable = low[1][0]
        name = "i" if variable == ("const", "i") else variable[1]
        if variable not in (("const", "i"), ("sym", name)):
            raise UnsupportedError(kind)
        first, last = self.integer(low[1][2]), self.integer(high)
        if last - first > MAX_TERMS:
            raise TooLargeError(f"{last - first} terms")
        saved = self.env.get(name)
        total = self.number(Fraction(0 if kind == "sum" else 1))
        body = _bind(body) if name == "i" else body
        for index in range(first, last + 1):
            self.env[name] = self.number(Fraction(index))
            value = self.value(body)
            total = self.add(total, value) if kind == "sum" else self.multiply(total, value)
        if saved is None:
            self.env.pop(name, None)
        else:
            self.env[name] = saved
        return total


def symbolic_names(node: Any) -> set[Any]:
    """Return the names of the symbols in a tree."""
    if not isinstance(node, tuple) or not node:
        return set()
    if node[0] == "sym":
        return {node[1]}
    return set().union(*map(symbolic_names, node))


def _bind(node: Any) -> Any:
    """The imaginary unit is the index inside a sum over i."""
    if node == ("const", "i"):
        return ("sym", "i")
    if isinstance(node, tuple):
        return tuple(_bind(part) for part in node)
    return node


def in_base(node: Node) -> Fraction:
    """Return the value of `("based", digits, base)`.

    Raises:
        UndefinedError: A digit is not one of the base.
    """
    whole, _, places = node[1].partition(".")
    try:
        return Fraction(int(whole + places, node[2]), node[2] ** len(places))
    except ValueError as error:
        raise UndefinedError(f"{node[1]} is not a number in base {node[2]}") from error


class Real(Backend):
    """Floats; leaving the real numbers is undefined."""

    lib: Any = math
    imaginary = False

    def __init__(self, env: Mapping[Any, Any] | None = None) -> None:
        """Start with no intermediate value seen."""
        super().__init__(env)
        self.largest = 1.0

    def number(self, value: Fraction) -> Any:
        """Return a float."""
        try:
            return value.numerator / value.denominator
        except OverflowError as error:
            raise TooLargeError("a float") from error

    def constant(self, name: str) -> Any:
        """Return pi or e; i in the complex backend."""
        if name == "i":
            if not self.imaginary:
                raise UndefinedError("i is not real")
            return 1j
        if name == "infty":
            raise UnsupportedError("infinity")
        return math.pi if name == "pi" else math.e

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b, remembering how large the parts were."""
        self.note(a)
        return a + b

    def multiply(self, a: Any, b: Any) -> Any:
        """Return a b, remembering how large it is."""
        value = a * b
        self.note(value)
        return value

    def note(self, value: Any) -> None:
        """Remember the largest intermediate value."""
        size = abs(value)
        if size > self.largest:
            self.largest = size
        if size != size or size == math.inf:
            raise TooLargeError("a float")

    def power(self, node: Node) -> Any:
        """Return a power."""
        base = self.value(node[1])
        exponent = self.value(node[2])
        try:
            if base == 0 and (exponent.real if self.imaginary else exponent) <= 0:
                raise UndefinedError("0 to a power that is not positive")
            value = base**exponent
        except OverflowError as error:
            raise TooLargeError("a power") from error
        if isinstance(value, complex) and not self.imaginary:
            raise UndefinedError("a root of a negative number")
        self.note(value)
        return value

    def call(self, node: Node) -> Any:
        """Return the value of a named function."""
        from .functions import apply

        name = node[1]
        if name == "det":
            from .matrices import determinant

            return self.value(determinant(node[2][0]))
        try:
            value = apply(self, name, [self.value(arg) for arg in node[2]])
        except (ValueError, ZeroDivisionError) as error:
            raise UndefinedError(str(error)) from error
        except (IndexError, TypeError) as error:
            raise UnsupportedError(f"{name} with {len(node[2])} arguments") from error
        except OverflowError as error:
            raise TooLargeError(name) from error
        if isinstance(value, complex) and not self.imaginary:
            raise UndefinedError(name)
        self.note(value)
        return value


class Complex(Real):
    """Complex floats, principal branches; odd roots of negative reals are real."""

    lib = cmath
    imaginary = True

    def _rational_env(self) -> dict[Any, Fraction]:
        real = {n: v.real for n, v in self.env.items() if getattr(v, "imag", 0) == 0}
        return {n: Fraction(int(v)) for n, v in real.items() if v == int(v)}
