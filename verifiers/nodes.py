"""The tree of an answer: what its nodes are, and the limits of reading one.

Nodes are tuples that start with their kind:
`("num", Fraction)`, `("dec", Fraction, places)`, `("sym", name)`,
`("const", "pi" | "e" | "i" | "infty")`, `("add", terms)`, `("mul", factors)`,
`("div", a, b)`, `("pow", a, b)`, `("neg", a)`, `("pm", sign, a)`,
`("fn", name, args)`, `("app", name, args)` (f(x), or a product),
`("pct", a)`, `("deg", a)`, `("based", digits, base)`,
`("big", kind, variable, low, high, body)` (sum, prod, int, lim).
`structure.py` adds those of lists, relations, sets, matrices and units.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from .tokens import LexError

Node = tuple[Any, ...]

MAX_DEPTH = 60
MAX_DIGITS = 4000


class ParseError(ValueError):
    """The text is not one whole answer of a known form."""


def number(text: str) -> Node:
    """Return the node of a numeral.

    Args:
        text: Digits with at most one decimal point.

    Raises:
        LexError: More digits than the limit.
    """
    if len(text) > MAX_DIGITS:
        raise LexError(f"a number of {len(text)} digits, more than {MAX_DIGITS}")
    if "." not in text:
        return ("num", Fraction(int(text)))
    whole, _, places = text.partition(".")
    scale = 10 ** len(places)
    return ("dec", Fraction(int(whole or "0") * scale + int(places or "0"), scale), len(places))
