"""Units of measure, money and counted things after a value."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .measures import UNITS
from .nodes import Node
from .words import FILLER_WORDS, MAGNITUDES

_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "平方": 2, "立方": 3}
_BLANK = frozenset({"unit", "units", "个", "只", "本", "人", "page", "time"})
_PLURALS = {
    "feet": "foot", "inches": "inch", "centuries": "century", "pence": "penny",
    "people": "person", "children": "child", "men": "man", "women": "woman",
}  # fmt: skip


class Unit(NamedTuple):
    """What stands after a value.

    Attributes:
        scale: What the value must be multiplied with because of words such as
            million, always.
        factor: Factor to the base units.
        dimensions: Exponents of base dimensions, sorted.
        noun: Words that are no unit, such as apples; "" when there are none.
        percent: Whether the unit is percent.
    """

    scale: Fraction
    factor: Fraction
    dimensions: tuple[tuple[str, int], ...]
    noun: str
    percent: bool = False

    @property
    def bare(self) -> bool:
        """Whether nothing is left but a plain number."""
        return not self.dimensions and not self.noun


@lru_cache(maxsize=4096)
def resolve(words: str) -> Unit:
    """Read the words after a value.

    Args:
        words: Words, `^2` exponents, `per` and `·`, as the parser collected them, with
            one blank between.

    Returns:
        The unit.
    """
    scale, factor = Fraction(1), Fraction(1)
    dimensions: dict[str, int] = {}
    nouns: list[str] = []
    sign, ahead = 1, 1
    last: tuple[Fraction, dict[str, int], int] | None = None
    percent = False
    for word in _split(words.split(" ")):
        lower = word.lower()
        if lower == "per" or lower == "每":
            sign = -1
        elif word == "·" or (lower in FILLER_WORDS and lower not in UNITS):
            continue
        elif word.startswith("^") or (lower in ("squared", "cubed") and last is not None):
            power = _POWERS.get(lower) or int(word[1:])
            if last is not None:
                base, parts, applied = last
                factor *= base ** (applied * power - applied)
                for name, exponent in parts.items():
                    dimensions[name] += exponent * (applied * power - applied)
        elif lower in _POWERS:
            ahead = _POWERS[lower]
        elif lower in MAGNITUDES:
            scale *= MAGNITUDES[lower]
        else:
            name = _known(word)
            if name is None:
                if lower not in _BLANK:
                    nouns.append(_singular(lower))
                last = None
                continue
            if name in ("percent", "pct", "percentage"):
                percent = True
                continue
            base, parts = Fraction(UNITS[name][0]), UNITS[name][1]
            power = sign * ahead
            factor *= base**power
            for key, exponent in parts.items():
                dimensions[key] = dimensions.get(key, 0) + exponent * power
            last, ahead = (base, parts, power), 1
            sign = 1 if sign == 1 else -1
    kept = tuple(sorted((k, v) for k, v in dimensions.items() if v))
    return Unit(scale, factor if kept else Fraction(1), kept, " ".join(nouns), percent)


def _split(words: list[str]) -> list[str]:
    out: list[str] = []
    for word in words:
        if word.isascii():
            out.append(word)
            continue
        out.extend(_split_chinese(word))
    return out


def _split_chinese(word: str) -> list[str]:
    """Cut 万元 into 万 and 元; a unit of several characters stays whole."""
    if word in UNITS or word in MAGNITUDES:
        return [word]
    for size in (2, 1):
        if word[:size] in MAGNITUDES and len(word) > size:
            return [word[:size], *_split_chinese(word[size:])]
    if word.startswith("每") and len(word) > 1:
        return ["每", *_split_chinese(word[1:])]
    return [word]


def _known(word: str) -> str | None:
    lower = word.lower()
    for form in (
        word,
        lower,
        _PLURALS.get(lower, ""),
        lower.removesuffix("s"),
        lower.removesuffix("es"),
    ):
        # A single letter is a unit only in its own case: M is no metre.
        if form in UNITS and (len(form) > 1 or form == word or not form.isascii()):
            return form
    return None


def _singular(word: str) -> str:
    word = re.sub(r"[^\w]", "", word)
    if word in _PLURALS:
        return _PLURALS[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        return word[:-1]
    return word


def compatible(first: Unit, second: Unit) -> Fraction | None:
    """Return the factor from the second unit to the first; None when they differ.

    A missing unit matches any unit. Two things that are counted must be the same
    thing, or share a word ("red apples" and "apples").

    Args:
        first: A unit.
        second: Another.
    """
    if not first.dimensions or not second.dimensions:
        if (first.dimensions and second.noun) or (second.dimensions and first.noun):
            return None
        if first.noun and second.noun:
            shared = set(first.noun.split()) & set(second.noun.split())
            return Fraction(1) if shared else None
        return Fraction(1)
    if first.dimensions != second.dimensions:
        # A pound may be money or a weight; the other side says which.
        pair = {first.dimensions, second.dimensions}
        pounds = Fraction(UNITS["pound"][0])
        if pair == {(("gbp", 1),), (("M", 1),)} and pounds in (first.factor, second.factor):
            return Fraction(1)
        return None
    return second.factor / first.factor


def compound(first: Node, second: Node) -> Node | None:
    """Join two quantities of one dimension, the second in a smaller unit.

    Args:
        first: A quantity such as 5 feet.
        second: What follows it, such as 6 inches.

    Returns:
        One quantity in the unit of the first; None when they do not join.
    """
    if first[0] != "qty" or second[0] != "qty":
        return None
    unit, part = resolve(first[2]), resolve(second[2])
    if not unit.dimensions or unit.dimensions != part.dimensions or part.factor >= unit.factor:
        return None
    rest: Node = ("mul", (("num", part.factor / unit.factor), second[1]))
    return ("qty", ("add", (first[1], rest)), first[2])
