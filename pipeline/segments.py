r"""Solutions cut into segments: chain-of-thought pieces, and the final answer as the last one.

    12+5=17 ⏎ | 17-3=14 ⏎ | \boxed{14}          by line: two thoughts, and the answer

A cut never falls inside a formula ($…$, $$…$$, \(…\), \[…\], an environment, GSM8K's <<…>>) or a
box. What separates two pieces goes with the one before it, so the pieces add up to the text, and
every token of a completion belongs to exactly one segment.

Source: 001_… (segments CL_1 … CL_M and the final answer M + 1); methods.md section 8.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from verifiers.boxes import last_boxes

By = Literal["paragraph", "line", "sentence"]

# Tokens that a decoder may need before it shows a token as it stands within a text.
CONTEXT = 4

_LINE = re.compile(r"\n(?:\s*\n)?")
_SENTENCE = re.compile(r"(?P<mark>[.!?…]+)[\"'”’)\]*]*\s+|[。！？…]+[”’」』）]*\s*|\n\s*")
_SEPARATORS = {"paragraph": re.compile(r"\n\s*\n"), "line": _LINE, "sentence": _SENTENCE}
# What a full stop does not end: shortened words, and the number of a list's item.
_SHORT = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|eq|eqs|fig|no|dr|mr|mrs|ms|st|approx|resp|w\.l\.o\.g)"
    r"|(?:^|\n)\s*(?:\d{1,3}|[A-Za-z]))\.$",
    re.IGNORECASE,
)
_LONGEST_SHORT = 16
_MARK = re.compile(
    r"\\begin\{(?P<begin>[A-Za-z]+\*?)\}|\\end\{(?P<end>[A-Za-z]+\*?)\}"
    r"|\\[\[\]()]|\\.|\$\$|\$|<<|>>|(?P<blank>\n\s*\n)",
    re.DOTALL,
)
_CLOSES = {r"\[": r"\]", r"\(": r"\)", "$$": "$$", "$": "$", "<<": ">>"}


class Cut(NamedTuple):
    """A text in pieces.

    Attributes:
        pieces: They add up to the text; none is blank, unless the text is.
        answered: Whether the last piece is the final answer.
    """

    pieces: list[str]
    answered: bool


def cut(text: str, by: By) -> Cut:
    """Cut a solution into its thoughts and the final answer.

    The answer runs from the start of the line that holds the last box (of the sentence, by
    sentence) to the end of the text. A text without a box has thoughts only.

    Args:
        text: A solution.
        by: What ends a thought: a blank line, a line break, or a sentence's end (or a line's).
    """
    spans = formulas(text)
    boxes = last_boxes(text)
    answer = None
    if boxes:
        spans = _joined([*spans, (boxes[0].opens, boxes[-1].closes)])
        finer = "sentence" if by == "sentence" else "line"
        before = [end for end in _cuts(text, finer, spans) if end <= boxes[0].opens]
        answer = before[-1] if before else 0
    points = [end for end in _cuts(text, by, spans) if answer is None or end < answer]
    points += [] if answer is None else [answer]
    pieces: list[str] = []
    last = 0
    for point in (*points, len(text)):
        if point > last:
            pieces.append(text[last:point])
            last = point
    # Blank pieces (a text that begins with a separator) go with what follows them.
    whole: list[str] = []
    blank = ""
    for piece in pieces:
        if piece.strip():
            whole.append(blank + piece)
            blank = ""
        else:
            blank += piece
    if blank and whole:
        whole[-1] += blank
    elif blank:
        whole = [blank]
    return Cut(whole, answer is not None)


def formulas(text: str) -> list[tuple[int, int]]:
    r"""Return where the formulas of a text lie, outermost ones, in order. Time is n log n.

    A formula that never ends is none. $…$ holds no blank line; its marks touch it ("$x$", so that
    "costs $5 and then $10" has none) or stand off on both sides ("$ x $").
    """
    marks: dict[str, list[int]] = defaultdict(list)
    blanks: list[int] = []
    open_at: dict[str, list[int]] = defaultdict(list)
    ends: dict[int, int] = {}  # of environments
    order: list[tuple[int, str]] = []
    for match in _MARK.finditer(text):
        mark, at = match.group(), match.start()
        if match["begin"]:
            open_at[match["begin"]].append(at)
            order.append((at, "begin"))
        elif match["end"]:
            if open_at[match["end"]]:
                ends[open_at[match["end"]].pop()] = match.end()
        elif match["blank"]:
            blanks.append(at)
        else:
            marks[mark].append(at)
            if mark in _CLOSES:
                order.append((at, mark))
    found: list[tuple[int, int]] = []
    reached = 0
    for at, mark in order:
        if at < reached:
            continue
        end = ends.get(at) if mark == "begin" else _closed(text, at, mark, marks, blanks)
        if end is not None:
            found.append((at, end))
            reached = end
    return found


def _closed(
    text: str, at: int, mark: str, marks: dict[str, list[int]], blanks: list[int]
) -> int | None:
    """Return where the formula that a mark opens ends, None where it opens none."""
    closers = marks[_CLOSES[mark]]
    inside = at + len(mark)
    index = bisect_left(closers, inside)
    if index == len(closers):
        return None
    close = closers[index]
    if mark == "$":
        index = bisect_left(blanks, at)
        if index < len(blanks) and blanks[index] < close:
            return None
        if close == inside or text[inside].isspace() != text[close - 1].isspace():
            return None
        if not text[inside].isspace() and text[close + 1 : close + 2].isdigit():
            return None
    return close + len(_CLOSES[mark])


def _cuts(text: str, by: str, spans: list[tuple[int, int]]) -> list[int]:
    """Return the positions after the separators that lie outside of all spans."""
    starts = [start for start, _ in spans]
    found = []
    for match in _SEPARATORS[by].finditer(text):
        # A separator may begin where a formula ends, so its last character decides.
        index = bisect_left(starts, match.end()) - 1
        if index >= 0 and match.end() <= spans[index][1] and match.end() > spans[index][0]:
            continue
        if by == "sentence" and match["mark"] and not _ends_sentence(text, match):
            continue
        found.append(match.end())
    return found


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Return whether a full stop with a space behind it ends a sentence."""
    if "\n" in match.group():
        return True
    if text[match.end() : match.end() + 1].islower():
        return False
    stop = match.end("mark")
    before = text[max(0, stop - _LONGEST_SHORT) : stop]
    if stop > _LONGEST_SHORT:  # what stands at the start of the excerpt is no start of a line
        before = " " + before
    return not _SHORT.search(before)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order, overlapping ones as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


class Segments(NamedTuple):
    """A completion in segments.

    Attributes:
        texts: Of each of them.
        numbers: Which one each token belongs to, from 0 upwards, none left out.
        answered: Whether the last one is the final answer.
    """

    texts: list[str]
    numbers: list[int]
    answered: bool


def segments_of(
    decode: Callable[[list[int]], str],
    token_ids: Sequence[int],
    text: str,
    by: By,
    most: int = 0,
) -> Segments:
    """Cut a completion's tokens.

    A token across a cut belongs to the piece that it begins in. A piece without a token of its
    own joins the one before it. Tokens without text (the end token) go with the last piece.

    Args:
        decode: Token ids to text.
        token_ids: Of the completion, at least one.
        text: What they say.
        by: What ends a thought.
        most: Most thoughts; what follows, up to the answer, joins the last. 0 is no limit.
    """
    pieces, answered = cut(text, by)
    if most and len(pieces) - answered > most:
        rest = len(pieces) - answered
        pieces = [*pieces[: most - 1], "".join(pieces[most - 1 : rest]), *pieces[rest:]]
    texts: list[str] = []
    lasts: list[int] = []
    for piece, last in zip(
        pieces, piece_ends(text, pieces, token_ends(decode, token_ids)), strict=True
    ):
        if lasts and lasts[-1] == last:
            texts[-1] += piece
        else:
            texts.append(piece)
            lasts.append(last)
    numbers: list[int] = []
    for number, last in enumerate(lasts):
        numbers += [number] * (last + 1 - len(numbers))
    numbers += [max(0, len(lasts) - 1)] * (len(token_ids) - len(numbers))
    return Segments(texts or [text], numbers, answered)


def token_ends(decode: Callable[[list[int]], str], token_ids: Sequence[int]) -> list[int]:
    """Return, for each token, how many characters of the text stand before its end.

    A character that several tokens spell belongs to the last of them. Time is linear.

    Args:
        decode: Token ids to text.
        token_ids: Of the completion.
    """
    ends: list[int] = []
    total = shown = 0
    start = 0  # first token that is not shown yet
    for index in range(len(token_ids)):
        first = max(0, start - CONTEXT)
        before = decode(list(token_ids[first:start]))
        now = decode(list(token_ids[first : index + 1]))
        shown = len(now) - len(before)
        if now.endswith("\ufffd"):  # the rest of a character is in a later token
            ends.append(total)
            continue
        total += shown
        start = index + 1
        ends.append(total)
    return ends


def piece_ends(text: str, pieces: list[str], ends: list[int]) -> list[int]:
    """Return the index of the token in which each piece of a text ends.

    Args:
        text: The whole.
        pieces: Parts of it in order; what stands between them belongs to none.
        ends: Of `token_ends`.

    Raises:
        ValueError: A piece is not in the text after the one before it.
    """
    found: list[int] = []
    position, token = 0, 0
    for piece in pieces:
        position = text.index(piece, position) + len(piece)
        while token < len(ends) - 1 and ends[token] < position:
            token += 1
        found.append(token)
    return found
