"""A formula of named scores: read into a tree, bounded, no code."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)|([A-Za-z_]\w*)|(\*\*|[-+*/^(),]))")
_FUNCTIONS: dict[str, tuple[int, int, Callable[..., float]]] = {
    "min": (1, 99, lambda *v: min(v)), "max": (1, 99, lambda *v: max(v)),
    "abs": (1, 1, lambda v: abs(v)), "floor": (1, 1, math.floor),
    "ceil": (1, 1, math.ceil), "exp": (1, 1, math.exp), "sqrt": (1, 1, math.sqrt),
    "log": (1, 1, math.log),
}  # fmt: skip
_MAX_LENGTH = 2000
_MAX_DEPTH = 40

Value = Callable[[Mapping[str, float]], float]


class Formula:
    """A formula.

    Args:
        text: For example `0.5 * accuracy + 0.5 * max(style, 0)`.
        names: The names it may use.

    Raises:
        ValueError: It cannot be read whole, or uses another name.
    """

    def __init__(self, text: str, names: set[str]) -> None:
        """Read the formula."""
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"formula of {len(text)} characters, more than {_MAX_LENGTH}")
        self.text, self.names = text, names
        self._tokens = self._cut()
        self._at = 0
        self._depth = 0
        self._value = self._sum()
        if self._at < len(self._tokens):
            raise self._wrong(f"cannot read on from {self._tokens[self._at]!r}")

    def value(self, scores: Mapping[str, float]) -> float:
        """Return the formula's value.

        Args:
            scores: A number for each name.

        Raises:
            ArithmeticError: A division by zero, a root of a negative number, a value
                too large to be a float.
        """
        try:
            value = self._value(scores)
        except ValueError as error:
            raise ArithmeticError(f"formula {self.text!r}: {error}") from error
        if isinstance(value, complex) or not math.isfinite(value):
            raise ArithmeticError(f"formula {self.text!r} has no finite real value")
        return float(value)

    def _cut(self) -> list[str]:
        tokens, at = [], 0
        text = self.text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._wrong(f"cannot read {text[at : at + 10]!r}")
            tokens.append(match.group().strip())
            at = match.end()
        return tokens

    def _wrong(self, why: str) -> ValueError:
        return ValueError(
            f"calculate_output {self.text!r}: {why}; expected names {sorted(self.names)}, numbers, "
            f"+ - * / ^, brackets and {', '.join(_FUNCTIONS)}"
        )

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *texts: str) -> str:
        token = self._peek()
        if token and token in texts:
            self._at += 1
            return token
        return ""

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._wrong(f"nested more than {_MAX_DEPTH} deep")
        left = self._product()
        while sign := self._take("+", "-"):
            left = _binary(sign, left, self._product())
        self._depth -= 1
        return left

    def _product(self) -> Value:
        left = self._signed()
        while sign := self._take("*", "/"):
            left = _binary(sign, left, self._signed())
        return left

    def _signed(self) -> Value:
        negative = False
        while sign := self._take("-", "+"):
            negative ^= sign == "-"
        inner = self._power()
        return (lambda scores: -inner(scores)) if negative else inner

    def _power(self) -> Value:
        base = self._atom()
        if self._take("^", "**"):
            return _binary("^", base, self._signed())
        return base

    def _atom(self) -> Value:
        token = self._peek()
        self._at += 1
        if token == "(":  # noqa: S105 -- a bracket, not a password
            inner = self._sum()
            if not self._take(")"):
                raise self._wrong("a bracket is not closed")
            return inner
        if token[:1].isdigit() or token[:1] == ".":
            number = float(token)
            return lambda scores: number
        if token in self.names:
            return lambda scores: float(scores[token])
        if token in _FUNCTIONS and self._take("("):
            return self._call(token)
        raise self._wrong(f"found {token!r}" if token else "it ends too early")

    def _call(self, name: str) -> Value:
        least, most, function = _FUNCTIONS[name]
        args = [self._sum()]
        while self._take(","):
            args.append(self._sum())
        if not self._take(")") or not least <= len(args) <= most:
            raise self._wrong(f"{name} with {len(args)} arguments")
        return lambda scores: float(function(*(arg(scores) for arg in args)))


def _binary(sign: str, left: Value, right: Value) -> Value:
    if sign == "+":
        return lambda scores: left(scores) + right(scores)
    if sign == "-":
        return lambda scores: left(scores) - right(scores)
    if sign == "*":
        return lambda scores: left(scores) * right(scores)
    if sign == "/":
        return lambda scores: left(scores) / right(scores)
    return lambda scores: left(scores) ** right(scores)
