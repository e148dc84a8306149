"""The named functions on floats, complex floats and many-digit numbers alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import Real

_DIRECT = {"sin": "sin", "cos": "cos", "tan": "tan", "exp": "exp", "sinh": "sinh", "cosh": "cosh"}
_INVERSE = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arsinh": "asinh", "arcosh": "acosh",
    "artanh": "atanh",
}  # fmt: skip
_RECIPROCAL = {"cot": "tan", "sec": "cos", "csc": "sin", "sech": "cosh", "csch": "sinh"}
_FLAT = 1e-9


def apply(backend: Real, name: str, args: list[Any]) -> Any:
    """Return a function's value.

    Args:
        backend: Supplies the library (`math`, `cmath` or `mpmath`) and the mode.
        name: The function, as in `words.FUNCTIONS`.
        args: Its arguments, in the numbers of the backend.

    Returns:
        The value.

    Raises:
        UndefinedError: No value there.
        UnsupportedError: No rule for the function.
        TooLargeError: Beyond the limits.
    """
    from .evaluate import UndefinedError, UnsupportedError

    lib, first = backend.lib, args[0]
    if len(args) == 1:
        if name in _DIRECT or name in ("tanh", "coth"):
            backend_guard(backend, first)
        if name in _DIRECT:
            return getattr(lib, _DIRECT[name])(first)
        if name in _INVERSE:
            return getattr(lib, _INVERSE[name])(first)
        if name in ("tanh", "coth"):
            return lib.tanh(first) if name == "tanh" else 1 / lib.tanh(first)
        if name in _RECIPROCAL:
            below = getattr(lib, _RECIPROCAL[name])(first)
            if abs(below) < _FLAT * _FLAT:
                raise UndefinedError(name)
            return 1 / below
        if name == "arccot":
            return lib.atan(1 / first) if first != 0 else lib.atan(first) + lib.acos(first * 0)
        if name in ("arcsec", "arccsc"):
            return lib.acos(1 / first) if name == "arcsec" else lib.asin(1 / first)
        if name in ("ln", "log"):
            if first == 0:
                raise UndefinedError("log 0")
            # An unmarked "log" is natural here; `equality` also tries base ten.
            return lib.log(first)
        if name in ("abs", "norm"):
            return abs(first)
    if name == "log" and len(args) == 2:
        if first == 0 or args[1] == 0:
            raise UndefinedError("log 0")
        return lib.log(first) / lib.log(args[1])
    if name == "root":
        return _root(backend, first, args[1] if len(args) == 2 else None)
    if name in ("Re", "Im", "arg", "sgn"):
        return _parts(backend, name, first)
    if backend.imaginary and any(getattr(a, "imag", 0) != 0 for a in args):
        raise UnsupportedError(name)
    return _stepwise(name, [getattr(a, "real", a) for a in args])


def backend_guard(backend: Real, value: Any) -> None:
    """Refuse an argument so large that a function of it means nothing or never ends."""
    from .evaluate import TooLargeError

    if abs(value) > 1e6:
        raise TooLargeError("the argument of a function")
    grown = getattr(backend, "grown", None)
    if grown is not None:
        grown(abs(value))


def _root(backend: Real, value: Any, degree: Any) -> Any:
    from .evaluate import UndefinedError

    if degree is None:
        if not backend.imaginary and value < 0:
            raise UndefinedError("a square root of a negative number")
        return backend.lib.sqrt(value)
    order = round(getattr(degree, "real", degree))
    if order == 0:
        raise UndefinedError("a root of degree 0")
    if degree == order and order % 2 and getattr(value, "imag", 0) == 0:
        real = getattr(value, "real", value)
        return -((-real) ** (1 / degree)) if real < 0 else value ** (1 / degree)
    if not backend.imaginary and value < 0:
        raise UndefinedError("an even root of a negative number")
    return value ** (1 / degree)


def _parts(backend: Real, name: str, value: Any) -> Any:
    real, imag = getattr(value, "real", value), getattr(value, "imag", 0)
    if name == "Re":
        return real
    if name == "Im":
        return imag + 0 * real
    if name == "sgn" and imag == 0:
        return (real > 0) - (real < 0) + 0 * real
    return math.atan2(float(imag), float(real))


def _stepwise(name: str, args: list[Any]) -> Any:
    """Functions that jump or are defined on integers."""
    from .evaluate import MAX_FACTORIAL, TooLargeError, UndefinedError, UnsupportedError

    first = args[0]
    if name in ("max", "min"):
        return max(args) if name == "max" else min(args)
    if name in ("floor", "ceil"):
        near = round(first)
        # Rounding noise must not push a whole number over the step.
        whole = near if abs(first - near) < _FLAT else math.floor(first) + (name == "ceil")
        return whole + 0 * first
    whole = [round(a) for a in args]
    if any(abs(a - b) > _FLAT for a, b in zip(args, whole, strict=True)):
        raise UndefinedError(f"{name} of a value that is no integer")
    if name in ("factorial", "factorial2", "binom"):
        if whole[0] < 0:
            raise UndefinedError(f"{name} of a negative number")
        if whole[0] > MAX_FACTORIAL:
            raise TooLargeError(name)
        if name == "factorial":
            return math.factorial(whole[0]) + 0 * first
        if name == "factorial2":
            return math.prod(range(whole[0], 0, -2)) + 0 * first
        return (math.comb(whole[0], whole[1]) if whole[1] >= 0 else 0) + 0 * first
    if name == "mod":
        if whole[1] == 0:
            raise UndefinedError("mod 0")
        return whole[0] % whole[1] + 0 * first
    if name in ("gcd", "lcm"):
        return getattr(math, name)(*whole) + 0 * first
    raise UnsupportedError(name)
