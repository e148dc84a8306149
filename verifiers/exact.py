"""Exact backends: rational numbers, and integers modulo a prime."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from .evaluate import (
    MAX_BITS,
    MAX_FACTORIAL,
    Backend,
    TooLargeError,
    UndefinedError,
    UnsupportedError,
)
from .nodes import Node

PRIME = (1 << 61) - 1


class Exact(Backend):
    """Rational numbers; everything irrational is unsupported."""

    def number(self, value: Fraction) -> Fraction:
        """Return the rational itself."""
        return value

    def add(self, a: Fraction, b: Fraction) -> Fraction:
        """Return a + b within the size limit."""
        return _checked(a + b)

    def multiply(self, a: Fraction, b: Fraction) -> Fraction:
        """Return a b within the size limit."""
        return _checked(a * b)

    def power(self, node: Node) -> Fraction:
        """Return a rational power of a rational, when it is rational."""
        exponent = self.value(node[2])
        base = self.value(node[1])
        if exponent.denominator != 1:
            return _rational_root(base, exponent)
        if base == 0 and exponent <= 0:
            raise UndefinedError("0 to a power that is not positive")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) != 1 and base != 0 and bits * abs(exponent) > MAX_BITS:
            raise TooLargeError("a power")
        if abs(exponent) > 1 << 40:
            exponent = exponent % 2 + 2
        return base ** int(exponent)

    def call(self, node: Node) -> Fraction:
        """Return the functions that map rationals to rationals."""
        name = node[1]
        if name == "det":
            from .matrices import determinant

            return self.value(determinant(node[2][0]))
        args = [self.value(arg) for arg in node[2]]
        first = args[0]
        if name == "abs":
            return abs(first)
        if name == "floor":
            return Fraction(math.floor(first))
        if name == "ceil":
            return Fraction(math.ceil(first))
        if name == "sgn":
            return Fraction((first > 0) - (first < 0))
        if name in ("max", "min"):
            return max(args) if name == "max" else min(args)
        if name == "root" and len(args) <= 2:
            degree = args[1] if len(args) == 2 else Fraction(2)
            if degree == 0:
                raise UndefinedError("a root of degree 0")
            return _rational_root(first, 1 / degree)
        return _integer_function(name, args)


def _checked(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > 4 * MAX_BITS:
        raise TooLargeError("a number")
    return value


def _rational_root(base: Fraction, exponent: Fraction) -> Fraction:
    degree = exponent.denominator
    negative = base < 0
    if negative and degree % 2 == 0:
        raise UnsupportedError("an even root of a negative number")
    if degree > 64:
        raise UnsupportedError("a root of high degree")
    top = _integer_root(abs(base.numerator), degree)
    bottom = _integer_root(base.denominator, degree)
    if top is None or bottom is None:
        raise UnsupportedError("an irrational root")
    root = Fraction(-top if negative else top, bottom)
    if root == 0 and exponent < 0:
        raise UndefinedError("0 to a negative power")
    if root.numerator.bit_length() * abs(exponent.numerator) > MAX_BITS:
        raise TooLargeError("a power")
    return root**exponent.numerator


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            if middle**degree <= value:
                low = middle
            else:
                high = middle - 1
        root = low
    return root if root**degree == value else None


def _integer_function(name: str, args: list[Fraction]) -> Fraction:
    if name not in ("factorial", "factorial2", "binom", "gcd", "lcm", "mod"):
        raise UnsupportedError(name)
    if any(arg.denominator != 1 for arg in args):
        raise UnsupportedError(f"{name} of a fraction")
    if len(args) < 2 and name in ("binom", "mod", "gcd", "lcm"):
        raise UnsupportedError(f"{name} of one argument")
    ints = [int(arg) for arg in args]
    if name in ("factorial", "factorial2"):
        if ints[0] < 0:
            raise UndefinedError("a factorial of a negative number")
        if ints[0] > MAX_FACTORIAL:
            raise TooLargeError("a factorial")
        if name == "factorial":
            return Fraction(math.factorial(ints[0]))
        return Fraction(math.prod(range(ints[0], 0, -2)))
    if name == "binom":
        if len(ints) != 2 or ints[0] < 0:
            raise UnsupportedError("binom")
        if ints[0] > 20_000:
            raise TooLargeError("a binomial coefficient")
        return Fraction(math.comb(ints[0], ints[1]) if ints[1] >= 0 else 0)
    if name == "mod":
        if len(ints) != 2 or ints[1] == 0:
            raise UndefinedError("mod 0")
        return Fraction(ints[0] % ints[1])
    return Fraction(math.gcd(*ints) if name == "gcd" else math.lcm(*ints))


class Residue(Backend):
    """Integers modulo a prime: decides polynomial and rational identities, any size."""

    def number(self, value: Fraction) -> int:
        """Return the residue of a rational."""
        return self.divide(value.numerator % PRIME, value.denominator % PRIME)

    def add(self, a: int, b: int) -> int:
        """Return a + b."""
        return (a + b) % PRIME

    def multiply(self, a: int, b: int) -> int:
        """Return a b."""
        return a * b % PRIME

    def negate(self, a: int) -> int:
        """Return -a."""
        return -a % PRIME

    def divide(self, a: int, b: int) -> int:
        """Return a / b."""
        if b == 0:
            raise UndefinedError("division by zero")
        return a * pow(b, -1, PRIME) % PRIME

    def power(self, node: Node) -> int:
        """Return a power with an integer exponent of any size."""
        exponent = Exact().value(node[2])
        if exponent.denominator != 1:
            # Not a rational function, unless the base is a constant such as 4^(1/2).
            return self.number(Exact().value(node))
        base = self.value(node[1])
        if base == 0 and exponent <= 0:
            raise UndefinedError("0 to a power that is not positive")
        return pow(base, int(exponent), PRIME)

    def call(self, node: Node) -> int:
        """Return a constant function value."""
        if node[1] == "det":
            from .matrices import determinant

            return self.value(determinant(node[2][0]))
        return self.number(Exact().value(node))

    def big(self, node: Node) -> int:
        """Return a finite sum or product whose bounds are numbers."""
        return super().big(node)

    def _rational_env(self) -> dict[Any, Fraction]:
        return {}
