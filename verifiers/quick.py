r"""The cheap path: plain numbers, fractions, letters and yes/no, by one regex match.

Most real answers end here, in a few microseconds. A value that this file cannot
read whole is left to the parser; it never reads a prefix.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_WRAPPED = re.compile(r"^(?:\\\(|\\\[|\$\$?|\*\*)\s*(.*?)\s*(?:\\\)|\\\]|\$\$?|\*\*)$", re.DOTALL)
_FACED = re.compile(r"^\\(?:text|mathrm|textbf|mathbf|boxed|textrm)\s*\{\s*([^{}]*?)\s*\}$")
_NUMBER = re.compile(
    r"([-+]?)\s*(?:([1-9]\d{0,2}(?:(?:,|\{,\}|,\\!\s?)\d{3})+|\d{1,4000})(\.\d{0,400})?|(\.\d{1,400}))"
)
_FRACTION = re.compile(
    r"([-+]?)\s*\\[dtc]?frac\s*(?:\{\s*(-?)\s*(\d{1,4000})\s*\}\s*\{\s*(\d{1,4000})\s*\}|(\d)(\d))"
)
_RATIO = re.compile(r"([-+]?)\s*(\d{1,4000})\s*/\s*(\d{1,4000})")
_LETTER = re.compile(r"\(?([A-J])\)?\.?")
_SHORT = 4100
_WORDS = {"true": "true", "false": "false", "yes": "yes", "no": "no"}


class Quick(NamedTuple):
    """An answer that the cheap path could read.

    Attributes:
        kind: `number`, `letter` or `word`.
        value: A Fraction, a capital letter or a lower-case word.
        places: Digits after the decimal point; None for a value without one.
    """

    kind: str
    value: Fraction | str
    places: int | None = None

    def normal(self) -> str:
        """Return the normal form that a verdict shows."""
        return str(self.value)


def tidy(text: str) -> str:
    """Strip what never belongs to an answer: blanks, math delimiters, a full stop.

    Args:
        text: An answer as extracted.

    Returns:
        The answer without its wrapping.
    """
    text = text.strip()
    if text[:1] == "#":
        text = text.lstrip("#").lstrip()
    while True:
        before = text
        if text[-1:] in ".。" and len(text) > 1 and text[-2:-1] != ".":
            text = text[:-1].rstrip()
            if text.endswith("\\"):  # the "\." of "\right."
                return before
        text = text.removeprefix("\\displaystyle").lstrip()
        if text[:1] == text[-1:] == '"' and text.count('"') == 2:
            text = text[1:-1].strip()
        if text[:1] in "$\\*" and len(text) <= _SHORT:
            match = _WRAPPED.match(text)
            if match is not None and _one_formula(match.group(1), text):
                text = match.group(1)
            else:
                match = _FACED.match(text)
                if match is not None:
                    text = match.group(1)
        if text == before:
            return text


def _one_formula(inner: str, text: str) -> bool:
    if text[0] == "*":
        return "*" not in inner
    return (text[0] == "$" and "$" not in inner) or (
        text[0] == "\\" and not re.search(r"\\[()\[\]]", inner)
    )


def read(text: str) -> Quick | None:
    """Read a tidied answer.

    Args:
        text: What `tidy` returned.

    Returns:
        The value, or None when the answer is not of a simple form.
    """
    if len(text) <= _CACHED:
        return _read_cached(text)
    return None if len(text) > _SHORT else _read(text)


def _read(text: str) -> Quick | None:
    if not text:
        return None
    match = _NUMBER.fullmatch(text)
    if match is not None:
        sign, whole, part, bare = match.groups()
        digits = re.sub(r"\D", "", whole) if whole else "0"
        places = (part or bare or "")[1:]
        scale = 10 ** len(places)
        value = Fraction(int(digits) * scale + int(places or "0"), scale)
        return Quick(
            "number", -value if sign == "-" else value, len(places) if part or bare else None
        )
    if text[0] in "-+\\":
        match = _FRACTION.fullmatch(text)
        if match is not None:
            sign, inner, top, bottom, one, two = match.groups()
            value = _over(top or one, bottom or two)
            negative = (sign == "-") != (inner == "-")
            return None if value is None else Quick("number", -value if negative else value)
    match = _RATIO.fullmatch(text)
    if match is not None:
        value = _over(match.group(2), match.group(3))
        return (
            None if value is None else Quick("number", -value if match.group(1) == "-" else value)
        )
    match = _LETTER.fullmatch(text)
    if match is not None:
        return Quick("letter", match.group(1))
    word = _WORDS.get(text.lower())
    return None if word is None else Quick("word", word)


# Only short texts are kept, so that the cache has a bound in bytes too.
_CACHED = 200
_read_cached = lru_cache(maxsize=32768)(_read)


def _over(top: str, bottom: str) -> Fraction | None:
    return None if int(bottom) == 0 else Fraction(int(top), int(bottom))


def decide(gold: Quick, answer: Quick) -> tuple[bool, str] | None:
    """Compare two simple answers.

    Args:
        gold: The gold.
        answer: The answer.

    Returns:
        Whether they are equal and the name of the rule, or None when a finer
        rule must decide (a decimal that may be a rounding of the gold).
    """
    if gold.kind != answer.kind:
        if {gold.kind, answer.kind} == {"number", "letter"}:
            return False, "kind"
        return None
    if gold.value == answer.value:
        return True, {"number": "rational", "letter": "choice", "word": "word"}[gold.kind]
    if gold.kind == "number":
        if gold.places or answer.places:
            return None
        return False, "rational"
    if gold.kind == "letter":
        return False, "choice"
    return None
