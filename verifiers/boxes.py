r"""Finds `\boxed{...}` and its relatives, in one pass and in linear time."""

from __future__ import annotations

import re
from typing import NamedTuple

# A literal backspace stands where a Python string literal ate the "\b".
_OPENER = re.compile(r"(?:\\|\x08)?(?:\\boxed|\\fbox|\\framebox|\x08oxed)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TAG_OPEN = "<|begin_of_box|>"
_TAG_CLOSE = "<|end_of_box|>"

# What may stand between two boxes that are one answer: separators, math
# delimiters, at most a few words around an "and" or "or", a "name =".
_GAP_PLAIN = re.compile(
    r"(?:[\s,;&+$\\()\[\]、，；]|\\quad|\\qquad|\\text\s*\{\s*(?:and|or|,|;)?\s*\}|\band\b|\bor\b"
    r"|和|或|以及)*"
)
_GAP_WORDS = re.compile(
    r"[\s$\\()\[\]]*(?:\\q?quad\s*)*(?:\\text\s*\{)?[A-Za-z ()]{0,40}\b(?:and|or)\b\s*\}?"
    r"(?:\s*\\q?quad)*[\s$\\()\[\]A-Za-z_0-9{}]{0,16}=?[\s$\\()\[\]]*"
)
_GAP_LIMIT = 80
_LIST_LIMIT = 64


class Box(NamedTuple):
    """One box in a text.

    Attributes:
        content: What stands inside; None when the box never ends.
        start: Position of the first character inside.
        end: Position after the last character inside.
        opens: Position of the command itself.
        closes: Position after the closing brace or tag.
    """

    content: str | None
    start: int
    end: int
    opens: int
    closes: int


def last_boxes(text: str, begin: int = 0) -> list[Box]:
    r"""Return the last box of a text, with the boxes that stand directly beside it.

    `\boxed{1}, \boxed{2}` and `\boxed{1} and \boxed{2}` are one answer of two
    values, so both come back; across a sentence only the last one counts.

    Args:
        text: The text.
        begin: Where to start looking.

    Returns:
        Boxes in the order of the text; empty when there is none. When the last
        one never ends it comes back alone with `content` None; when it stands
        inside another box, the outermost one comes back in its place.
    """
    openers = [m for m in _OPENER.finditer(text, begin) if m.end() < len(text)]
    dangling = _ends_in_opener(text, begin)
    tag = text.rfind(_TAG_OPEN)
    if tag >= begin and (not openers or tag > openers[-1].start()):
        return [_tagged(text, tag)]
    if dangling is not None:
        return [dangling]
    if not openers:
        return []
    last = _read(text, openers[-1])
    if last.content is None:
        return [last]
    before = [_read(text, opener) for opener in openers[-_LIST_LIMIT:-1]]
    # A box inside a box is a part of that answer: "\boxed{7 or \boxed{8}}" is not 8.
    around = (box for box in before if box.content is not None and box.closes > last.closes)
    last = next(around, last)
    found = [last]
    # Walk back while the boxes belong to one enumeration.
    for box in reversed(before):
        if box.opens >= last.opens:
            continue
        if box.content is None or box.closes > found[0].opens:
            break
        if not _joins(text[box.closes : found[0].opens]):
            break
        found.insert(0, box)
    return found


def _joins(gap: str) -> bool:
    if len(gap) > _GAP_LIMIT:
        return False
    if _GAP_PLAIN.fullmatch(gap) is not None:
        # A bare blank between two boxes is not an enumeration.
        marks = (",", ";", "and", "or", "quad", "+", "&", "、", "和", "或")
        return any(mark in gap for mark in marks)
    return _GAP_WORDS.fullmatch(gap) is not None


def _ends_in_opener(text: str, begin: int) -> Box | None:
    """A text cut off right after the command has an unterminated box."""
    stripped = text.rstrip()
    for command in ("\\boxed", "\\fbox", "\\framebox"):
        if stripped.endswith(command) and len(stripped) - len(command) >= begin:
            return Box(None, len(text), len(text), len(stripped) - len(command), len(text))
    return None


def _tagged(text: str, tag: int) -> Box:
    start = tag + len(_TAG_OPEN)
    end = text.find(_TAG_CLOSE, start)
    if end < 0:
        return Box(None, start, len(text), tag, len(text))
    return Box(text[start:end], start, end, tag, end + len(_TAG_CLOSE))


def _read(text: str, opener: re.Match[str]) -> Box:
    start = opener.end()
    if text[start] != "{":
        return _unbraced(text, opener)
    depth = 0
    for match in _BRACE.finditer(text, start):
        token = match.group()
        if token == "{":  # noqa: S105 -- a brace, not a password
            depth += 1
        elif token == "}":  # noqa: S105 -- a brace
            depth -= 1
            if depth == 0:
                return Box(
                    text[start + 1 : match.start()],
                    start + 1,
                    match.start(),
                    opener.start(),
                    match.end(),
                )
    # Nothing else ends a box, not even the end of the formula in "$\boxed{7$".
    return Box(None, start + 1, len(text), opener.start(), len(text))


def _unbraced(text: str, opener: re.Match[str]) -> Box:
    r"""Read TeX's short form, `\boxed 7`, up to the end of the number or word."""
    match = re.compile(r"[-+]?[\w.,/]*[\w]").match(text, opener.end())
    if match is None:
        return Box(None, opener.end(), len(text), opener.start(), len(text))
    return Box(match.group(), match.start(), match.end(), opener.start(), match.end())
