"""Many-digit values by mpmath, with a precision that follows the size of the parts.

Two expressions that agree in sixteen digits may still differ (1 + 10^-40 and 1).
The first pass records the largest and smallest magnitude of any part; the second
uses enough digits to tell values of that shape apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .evaluate import Real, TooLargeError, UndefinedError, UnsupportedError
from .nodes import Node

BASE_BITS = 220
MAX_BITS = 40_000


@lru_cache(maxsize=1)
def _context() -> Any:
    import mpmath

    return mpmath.mp.clone()


class Precise(Real):
    """mpmath reals or complexes at a given precision.

    Args:
        env: Values of symbols, as Fractions.
        bits: Working precision.
        imaginary: Whether complex values are allowed.
    """

    def __init__(self, env: Mapping[Any, Any] | None, bits: int, *, imaginary: bool) -> None:
        """Set the precision; the context is this backend's own."""
        self.lib = _context()
        self.lib.prec = bits
        self.imaginary = imaginary
        self.magnitude = 0
        super().__init__({name: self._mp(value) for name, value in (env or {}).items()})

    def _mp(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            return self.lib.mpf(value.numerator) / value.denominator
        return self.lib.mpc(value) if isinstance(value, complex) else self.lib.mpf(value)

    def number(self, value: Fraction) -> Any:
        """Return the rational at the working precision."""
        result = self._mp(value)
        self.note(result)
        return result

    def constant(self, name: str) -> Any:
        """Return pi, e or i."""
        if name == "pi":
            return +self.lib.pi
        if name == "e":
            return +self.lib.e
        if name == "i" and self.imaginary:
            return self.lib.mpc(0, 1)
        if name == "i":
            raise UndefinedError("i is not real")
        raise UnsupportedError("infinity")

    def note(self, value: Any) -> None:
        """Remember how far from 1 the magnitude of a part is, in bits."""
        if value == 0:
            return
        size = abs(int(self.lib.mag(value))) if self.lib.isfinite(value) else MAX_BITS * 10
        if size > self.magnitude:
            self.magnitude = size
        if size > 1 << 30:
            raise TooLargeError("a part")

    def grown(self, size: Any) -> None:
        """Count an argument whose exponential is large, as in tanh 100 = 1 - 2e-87."""
        bits = int(size * 3) + 1
        self.magnitude = max(self.magnitude, bits)

    def power(self, node: Node) -> Any:
        """Return a power whose result keeps a machine-sized exponent."""
        base, exponent = self.value(node[1]), self.value(node[2])
        if base == 0:
            if self.lib.re(exponent) <= 0:
                raise UndefinedError("0 to a power that is not positive")
            return base
        if abs(exponent) * (abs(self.lib.mag(base)) + 1) > 1 << 22:
            raise TooLargeError("a power")
        if not self.imaginary and base < 0 and exponent != int(exponent):
            raise UndefinedError("a root of a negative number")
        value = self.lib.power(base, exponent)
        self.note(value)
        return value

    def call(self, node: Node) -> Any:
        """Return a function value; leaving the reals is undefined in the real mode."""
        value = super().call(node)
        if not self.imaginary and isinstance(value, self.lib.mpc):
            if value.imag != 0:
                raise UndefinedError(node[1])
            value = value.real
        return value

    def _rational_env(self) -> dict[Any, Fraction]:
        out = {}
        for name, value in self.env.items():
            real = getattr(value, "real", value)
            if getattr(value, "imag", 0) == 0 and real == int(real):
                out[name] = Fraction(int(real))
        return out


def agree(a: Node, b: Node, env: Mapping[Any, Any], *, imaginary: bool) -> bool:
    """Whether two expressions agree to many digits at a point.

    Args:
        a: An expression.
        b: Another.
        env: Values of symbols, as Fractions.
        imaginary: Whether complex values are allowed.

    Returns:
        Whether they agree to far more digits than their parts are apart in size.

    Raises:
        ArithmeticError: A value is undefined, unsupported or too large.
    """
    bits = BASE_BITS
    for last in (False, False, True):
        backend = Precise(env, bits, imaginary=imaginary)
        first, second = backend.value(a), backend.value(b)
        needed = BASE_BITS + 4 * backend.magnitude
        gap = abs(first - second)
        limit = backend.lib.ldexp(1, backend.magnitude + 30 - bits)
        if needed <= bits or last:
            return bool(gap <= limit)
        if needed > MAX_BITS:
            raise TooLargeError("the precision that would tell them apart")
        if gap > limit * 2**20 and gap > backend.lib.ldexp(1, -40):
            return False
        bits = needed + 40
    raise TooLargeError("the precision that would tell them apart")
