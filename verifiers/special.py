"""Answers that are not formulas: words, dates, times of day, named choices."""

from __future__ import annotations

import re
from fractions import Fraction

from .nodes import Node
from .words import MONTHS, NAMED_ANSWERS, NUMBER_WORDS, WEEKDAYS

_TEXT = re.compile(
    r"\\(?:text|mathrm|textbf|mathbf|textit|textrm|mbox|operatorname|mathsf|emph)\s*\{([^{}]*)\}"
)
_CLOCK = re.compile(
    r"(\d{1,2}):(\d{2})(?::(\d{2}))?(?:\s*([ap])\.?\s*m\b\.?)?|(\d{1,2})\s*(?:([ap])\.?\s*m\b\.?|o'clock)",
    re.IGNORECASE,
)
# A number with letters for digits; one without is read by the parser.
_BASED = re.compile(
    r"(?:\\text\{|\\mathrm\{|\()?(?=\w*[0-9])([0-9A-Z]*[A-Z][0-9A-Z]*)(?:\}|\))?_\{?(1[1-9]|2\d|3[0-6])\}?"
)
_OPTION = re.compile(r"(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*:?\s*\(?([A-J])\)?")
_CHOICE = re.compile(
    r"\(([A-J])\)\s*\S.*|([A-J])\s*[.:)、](?:\s+\S|[^\x00-\x7f]).*|([A-J])(?:不|，|,\s*(?:not|it|because|since))\s*.*|([A-J])\s+[A-Z][a-z]{2,}.*",
    re.DOTALL,
)
_WORDS = re.compile(r"[A-Za-z一-鿿][A-Za-z一-鿿'’\-\s,.!()\"]*")


def plain(text: str) -> str:
    """Return a text without the commands that only set words."""
    for _ in range(3):
        shorter = _TEXT.sub(r"\1", text)
        if shorter == text:
            break
        text = shorter
    text = text.replace("\\!", "").replace("\\displaystyle", "")
    text = re.sub(r"\\(?:[,;: ]|q?quad)|~", " ", text)
    return " ".join(text.replace("{", " ").replace("}", " ").split()).strip(" .!。")


def read(text: str) -> Node | None:
    """Read an answer in words.

    Args:
        text: A tidied answer.

    Returns:
        `("word", name)`, `("clock", h, m, s, half)`, `("date", month, day, year)`,
        `("choice", letter, rest)`, a number, a set, or None when it is none of
        these.
    """
    if len(text) > 200:
        return None
    bare = plain(text)
    lower = bare.lower()
    named = NAMED_ANSWERS.get(lower)
    if named is not None:
        return _named(named)
    if lower in WEEKDAYS:
        return ("word", WEEKDAYS[lower])
    if not lower or not re.search(r"[a-z]|\d:", lower):
        return None
    match = _CLOCK.fullmatch(bare)
    if match is not None:
        return _clock(match)
    match = _BASED.fullmatch(text.replace(" ", ""))
    if match is not None and int(match.group(2)) <= 36:
        return ("based", match.group(1).lower(), int(match.group(2)))
    return _date(lower) or _spelled(lower) or _choice(bare)


def words(text: str) -> Node | None:
    """Read an answer of nothing but words, once no formula fits.

    Args:
        text: A tidied answer.

    Returns:
        `("text", words)` in lower case without articles, or None.
    """
    bare = plain(text)
    if not _WORDS.fullmatch(bare) or len(bare) > 2000:
        return None
    found = re.findall(r"[a-z一-鿿'’\-]+", bare.lower())
    kept = tuple(w for w in found if w not in ("the", "a", "an"))
    return ("text", " ".join(kept)) if kept else None


def _named(name: str) -> Node:
    if name == "∅":
        return ("set", ())
    if name == "ℝ":
        return ("std", "R")
    if name == "∞":
        return ("const", "infty")
    if name == "-∞":
        return ("neg", ("const", "infty"))
    return ("word", {"yes": "true", "no": "false"}.get(name, name))


def _clock(match: re.Match[str]) -> Node | None:
    hour, minute, second, half, alone, alone_half = match.groups()
    hours, minutes, seconds = int(hour or alone), int(minute or 0), int(second or 0)
    mark = (half or alone_half or "").lower()
    if hours > 24 or minutes > 59 or seconds > 59 or (mark and not 1 <= hours <= 12):
        return None
    return ("clock", hours, minutes, seconds, mark)


def _date(text: str) -> Node | None:
    parts = re.findall(r"[a-z]+|\d+", re.sub(r"(\d)(?:st|nd|rd|th)\b", r"\1", text))
    months = [MONTHS[p] for p in parts if p in MONTHS]
    numbers = [int(p) for p in parts if p.isdigit() and len(p) <= 4]
    others = [
        p
        for p in parts
        if not p.isdigit() and p not in MONTHS and p not in WEEKDAYS and p not in ("of", "the")
    ]
    if len(months) != 1 or others or not 1 <= len(numbers) <= 2:
        return None
    day = next((n for n in numbers if n <= 31), None)
    year = next((n for n in numbers if n > 31), None)
    if day is None and year is None:
        return None
    return ("date", months[0], day, year)


def _spelled(text: str) -> Node | None:
    """Read a number in words: twenty-one, three hundred and five, minus four."""
    parts = text.replace("-", " ").split()
    negative = bool(parts) and parts[0] in ("minus", "negative")
    parts = [p for p in parts[negative:] if p != "and"]
    scales = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
    if not parts or parts[0] not in NUMBER_WORDS or len(parts) > 12:
        return None
    total = group = 0
    for part in parts:
        if part in NUMBER_WORDS:
            group += NUMBER_WORDS[part]
        elif part == "hundred":
            group *= 100
        elif part in scales:
            total, group = total + group * scales[part], 0
        else:
            return None
    value = Fraction(total + group)
    return ("neg", ("num", value)) if negative else ("num", value)


def _choice(text: str) -> Node | None:
    named = _OPTION.fullmatch(text)
    if named is not None:
        return ("choice", named.group(1), "")
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    letter = next(filter(None, match.groups()))
    rest = text[text.index(letter) + 1 :].strip(" ).:、")
    return ("choice", letter, rest)
