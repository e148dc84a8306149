r"""Finds the answer in a text by a named, ordered policy.

`boxed`, the default, asks in this order and stops at the first that is there:
the last complete box after any closing think tag; `<answer>`; `####`; "answer
is"/答案是; and only when none of these stands in the text, the text itself when
all of it is an answer, and then its last formula or number. A marker that is
there but empty or unterminated ends the search: it is no answer, and an earlier
box or a later number is never taken in its place.

`answer` reads the text as a bare answer first and then as `boxed` does.
`boxed_only` stops after the box. The extraction of published graders is in
`published.py`.
"""

from __future__ import annotations

import difflib
import re
from collections import deque
from typing import NamedTuple

from .boxes import last_boxes

POLICIES = ("boxed", "boxed_only", "answer")

_THINK_CLOSE = re.compile(r"</think(?:ing)?\s*>|◁/think▷|</\|think\|>", re.IGNORECASE)
_THINK_OPEN = re.compile(r"<think(?:ing)?\s*>|◁think▷", re.IGNORECASE)
_STOP = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end|EOT|eos)\|>|</s>|<｜end▁of▁sentence｜>"
)
_TAG = re.compile(r"<(/?)answer\s*>", re.IGNORECASE)
_HASHES = re.compile(r"(?:^|[\s.])####[ \t]*([^\n]*)")
_PHRASE = re.compile(
    r"(?:final\s+answer|correct\s+answer|correct\s+option|correct\s+choice|\banswer|\br[ée]ponse"
    r"|\brespuesta|\bantwort|答案|答)"
    r"(?:\s+(?:is|are|was|est|es|ist|ist|to\s+[^.\n]{0,60}?\s+is|for\s+[^.\n]{0,60}?\s+is))?"
    r"\s*(?:[:：]|(?<=is)|(?<=are)|(?<=est)|(?<=es)|(?<=ist)|是|为|應為|应为|等于)\s*"
    r"|(?:^|\n)\s*A:\s*",
    re.IGNORECASE,
)
_ANSWER_WORD = re.compile(r"answer|r[ée]ponse|respuesta|antwort|答|\bA:", re.IGNORECASE)
_HEDGE = re.compile(
    r"\b(?:or|either|maybe|perhaps|possibly|might|could|not sure|alternatively)\b|或|可能|也许",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"(?:\bnot|n't|n’t|\bnever|\bneither|不是|不等于|并非)\s*(?:be\s+|equal\s+to\s+|equal\s+)?[\s$*\\(\[:=]*$",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|\\\(((?:(?!\\\().)+?)\\\)|(?<![\\$])\$(?!\$)((?:\\.|[^$\\])+?)\$"
    r"|\\begin\{(align|equation|gather)(\*?)\}(.+?)\\end\{\5\6\}",
    re.DOTALL,
)
_BOLD = re.compile(r"\*\*([^*\n]+?)\*\*")
_NUMBER = re.compile(
    r"(?<![\w.\\])[-+−]?(?:\$\s?)?(?:\d{1,3}(?:[,，]\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:\s?/\s?\d+|[eE][-+]?\d+)?(?:\s?\\?%)?(?:(?=[^\w.])|(?=\.(?!\d))|$|(?=[^\W\d_])|(?=²))"
)
_WORD = re.compile(
    r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|ln|log|lg|exp|sqrt|pi|arcsin|arccos|arctan|and|or)\b)"
    r"[A-Za-zÀ-ÿ'’]{2,}(?![A-Za-z])|[\u0400-\u1fff\u3000-\uff00]+|[.!?](?=\s|$)|\n|\\\s|<[^<>\n]{1,30}>|□"
)
_DIGIT = re.compile(r"\d")
_LETTER = re.compile(r"(?<![A-Za-z'’])\(?([A-Ja-j])\)?(?![A-Za-z'’]|\s*=)")
_UPPER = re.compile(r"(?<![A-Za-z'’\\])\(?([A-J])\)?(?![A-Za-z'’]|\s*=)")
_MORE_LETTERS = re.compile(r"\)?(?:\s*(?:\bor\b|\band\b|/|&|或|和)\s*\(?[A-J]\b\)?)+")
_LETTERS_BEFORE = re.compile(r"(?<![A-Za-z])(?:\(?[A-J]\)?\s*(?:\bor\b|\band\b|/|&|或|和)\s*\(?)+$")
_BLANK = re.compile(
    r"(?:\s|~|\\f?boxed|\\framebox|\$|\\[,;:! ]|\\q?quad|\\text\s*\{\s*\}|\{\s*\}|\.{3}|\\l?dots)*"
)
_TAIL = 4000
# A bare answer longer than this is no answer with a few words around it.
_BARE = 240
_DENIAL = re.compile(
    r"\b(?:cannot|can't|can not|could not|unable|impossible|undetermined|insufficient|not enough"
    r"|contradict\w*|incomplete|no such|does not exist|unclear)\b|无法|不能确定", re.IGNORECASE
)  # fmt: skip


class Candidate(NamedTuple):
    """A stretch of text that may be the answer.

    Attributes:
        text: The stretch, or several boxes joined by commas.
        start: Where it starts in the whole text.
        end: Where it ends.
        source: Which step of the policy found it.
    """

    text: str
    start: int
    end: int
    source: str


class Extraction(NamedTuple):
    """What a policy found.

    Attributes:
        candidates: In the order of preference; the first that can be read is the
            answer. Empty when there is none.
        reason: Why there is none (`empty_box`, `unterminated_box`, ...), or "".
    """

    candidates: tuple[Candidate, ...]
    reason: str = ""


def extract(text: str, policy: str = "boxed", *, choice: bool = False) -> Extraction:
    """Find the answer of a text.

    Args:
        text: A completion or a bare answer.
        policy: One of `POLICIES`, or of `published.POLICIES`.
        choice: Whether a choice letter is asked for, so that "I think it's B"
            is read as B.

    Returns:
        The candidates, or the reason for none.

    Raises:
        ValueError: An unknown policy.
    """
    if policy == "boxed" or policy == "boxed_only":
        return _boxed(text, choice, boxed_only=policy == "boxed_only")
    if policy == "answer":
        return _answer(text, choice)
    from . import published

    return published.extract(text, policy)


def _answer(text: str, choice: bool) -> Extraction:
    whole = Candidate(text.strip(), *_trim(text, 0, len(text)), "whole")
    if not whole.text:
        return Extraction((), "empty_answer")
    boxes = last_boxes(text) if "box" in text or "\x08oxed" in text else []
    if boxes:
        return _boxed(text, choice, boxed_only=False)
    if len(whole.text) > _BARE:
        return Extraction((whole,))
    rest = _boxed(text, choice, boxed_only=False)
    return Extraction((whole, *(c for c in rest.candidates if c.text != whole.text)))


def _boxed(text: str, choice: bool, *, boxed_only: bool) -> Extraction:
    begin, end = _region(text)
    if begin is None:
        return Extraction((), "unclosed_think")
    body = text if end == len(text) else text[:end]
    if "box" in body or "\x08oxed" in body:
        boxes = last_boxes(body, begin)
        if boxes:
            return _from_boxes(body, boxes)
    if boxed_only:
        return Extraction((), "no_box")
    if not body[begin:].strip():
        return Extraction((), "empty_text")
    for step in (_tag, _hashes, _phrase):
        found = step(body, begin, choice)
        if found is not None:
            return found
    return _tail(body, begin, choice)


def _region(text: str) -> tuple[int | None, int]:
    """The part that may hold the answer: after thinking, before end-of-turn marks."""
    begin = 0
    if "think" in text or "THINK" in text or "Think" in text:
        close = None
        for close in _THINK_CLOSE.finditer(text):
            begin = close.end()
        if close is None:
            opened = _THINK_OPEN.search(text)
            if opened is not None:
                return None, len(text)
    stop = None
    if "<|" in text or "</s>" in text or "<｜" in text:
        stop = _STOP.search(text, begin)
        while stop is not None and not text[begin : stop.start()].strip():
            begin = stop.end()
            stop = _STOP.search(text, begin)
    return begin, len(text) if stop is None else stop.start()


def _from_boxes(text: str, boxes: list) -> Extraction:
    last = boxes[-1]
    if last.content is None:
        return Extraction((), "unterminated_box")
    if any(_BLANK.fullmatch(box.content) for box in boxes):
        return Extraction((), "empty_box")
    if len(boxes) == 1:
        return Extraction((Candidate(last.content, last.start, last.end, "box"),))
    contents = list(dict.fromkeys(box.content.strip() for box in boxes))
    joined = " ; ".join(contents)
    return Extraction((Candidate(joined, boxes[0].start, last.end, "boxes"),))


def _tag(text: str, begin: int, choice: bool) -> Extraction | None:
    if "answer" not in text and "ANSWER" not in text and "Answer" not in text:
        return None
    tags = list(_TAG.finditer(text, begin))
    openers = [m for m in tags if not m.group(1)]
    if not openers:
        return None
    opener = openers[-1]
    closer = next((m for m in tags if m.group(1) and m.start() >= opener.end()), None)
    if closer is None:
        return Extraction((), "unterminated_answer_tag")
    start, end = _trim(text, opener.end(), closer.start())
    if start >= end:
        return Extraction((), "empty_answer_tag")
    whole = Candidate(text[start:end], start, end, "answer_tag")
    inside = _inside(text, start, end, choice, "answer_tag")
    return Extraction((whole, *inside))


def _hashes(text: str, begin: int, choice: bool) -> Extraction | None:
    if "####" not in text:
        return None
    last = last_match(_HASHES, text, begin)
    if last is None:
        return None
    start, end = _trim(text, last.start(1), last.end(1))
    line = text[start:end].strip("*# ")
    # "#### Step 3" is a heading of markdown, not an answer.
    if (
        not line
        or len(re.findall(r"[A-Za-z]{3,}", line)) > 3
        or not re.search(r"[\dA-J\\一-龥]", line)
    ):
        return None
    start, end = _trim(text, start, end)
    return Extraction((Candidate(text[start:end], start, end, "hashes"),))


def _phrase(text: str, begin: int, choice: bool) -> Extraction | None:
    low = max(begin, len(text) - _TAIL)
    if _ANSWER_WORD.search(text, low) is None:
        return None
    last = last_match(_PHRASE, text, low)
    if last is None:
        return None
    start, end = _segment(text, last.end())
    if start >= end:
        return Extraction((), "empty_phrase")
    if choice:
        letter = _LETTER.search(text, start, end)
        if letter is not None:
            low, high = _with_other_letters(text, *letter.span(1), start)
            return Extraction((Candidate(text[low:high], low, high, "phrase"),))
    whole = Candidate(text[start:end], start, end, "phrase")
    if _hedged(whole.text):
        return Extraction((whole,))
    return Extraction((whole, *_inside(text, start, end, choice, "phrase")))


def _segment(text: str, start: int) -> tuple[int, int]:
    """The sentence, formula or line that an answer phrase announces."""
    while start < len(text) and text[start] in " \t\n\r*:：\"“'}":
        start += 1
    math = _MATH.match(text, start)
    if math is not None:
        after = re.compile(r"\s*(?:\\?%|percent|pct|and|or|,|，|和|或)").match(text, math.end())
        if after is None:
            return next((math.span(g) for g in (1, 2, 3, 4, 7) if math.group(g)), math.span())
    stop = re.compile(r"[.!?](?=\s|$)|\n|。|<\|").search(text, start)
    # A full stop inside a formula does not end the sentence.
    while stop is not None and text.count("$", start, stop.start()) % 2 == 1:
        stop = re.compile(r"[.!?](?=\s|$)|\n|。|<\|").search(text, stop.end())
    end = len(text) if stop is None else stop.start()
    # "\\[\\text{Answer: } 17\\]": the formula began before the phrase, so it ends here.
    closer = re.compile(r"\\[\])]").search(text, start, end)
    if closer is not None and not re.search(r"\\[\[(]", text[start : closer.start()]):
        end = closer.start()
    return _trim(text, start, end)


def _with_other_letters(text: str, start: int, end: int, low: int) -> tuple[int, int]:
    """Widen a letter to "A or B", so that naming several is not naming one."""
    after = _MORE_LETTERS.match(text, end)
    low = max(low, start - 24)
    before = _LETTERS_BEFORE.search(text[low:start])
    return (low + before.start() if before else start), (after.end() if after else end)


def _hedged(segment: str) -> bool:
    return _HEDGE.search(segment) is not None and len(set(_NUMBER.findall(segment))) > 1


def _tail(text: str, begin: int, choice: bool) -> Extraction:
    start, end = _trim(text, begin, len(text))
    found = [Candidate(text[start:end], start, end, "whole")] if end - start <= 2000 else []
    if choice:
        letters = list(_UPPER.finditer(text, max(start, end - 400), end))
        if letters:
            low, high = _with_other_letters(text, *letters[-1].span(1), start)
            return Extraction((Candidate(text[low:high], low, high, "tail"),))
    # "It cannot be determined whether 5 ..." does not answer 5.
    if _DENIAL.search(text, max(start, end - 300), end) is None:
        found.extend(_inside(text, max(start, end - _TAIL), end, choice, "tail"))
    return Extraction(tuple(found), "" if found else "no_answer_found")


def _inside(text: str, start: int, end: int, choice: bool, source: str) -> list[Candidate]:
    """The last formula, bold stretch or number of a stretch, latest first."""
    found: list[Candidate] = []
    low = start
    formulas = list(_MATH.finditer(text, start, end))
    if formulas:
        math = formulas[-1]
        for group in (1, 2, 3, 4, 7):
            if math.group(group) and re.search(r"[\w\\]", math.group(group)):
                found.append(Candidate(math.group(group), *math.span(group), source))
    bold = last_match(_BOLD, text, start, end)
    if bold is not None:
        found.append(Candidate(bold.group(1), *bold.span(1), source))
    piece = _last_piece(text, start, end)
    if piece is not None:
        found.append(Candidate(text[piece[0] : piece[1]], *piece, source))
    number = last_match(_NUMBER, text, start, end)
    # A number inside a formula is a fragment of it, never the answer.
    if number is not None and not _in_formula(text, number.start(), number.end(), start, end):
        found.append(Candidate(number.group(), *number.span(), source))
    found = [c for c in found if not _denied(text, max(low, c.start - 40), c.start)]
    # Several candidates in one stretch: the one that ends last was said last.
    return sorted(found, key=lambda c: (c.end, c.end - c.start), reverse=True)


def _denied(text: str, low: int, start: int) -> bool:
    """Whether what stands directly before a value denies it: "it is not 7"."""
    return _NOT.search(text[low:start]) is not None


def _last_piece(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The last stretch of formula characters between words, with a digit in it."""
    cuts = [(m.start(), m.end()) for m in _WORD.finditer(text, start, end)]
    last = None
    at = start
    for cut_start, cut_end in [*cuts, (end, end)]:
        if _DIGIT.search(text, at, cut_start):
            last = (at, cut_start)
        at = cut_end
    if last is None:
        return None
    low, high = last
    while low < high and text[low] in " \t\n=:：,;.*，、$":
        low += 1
    while high > low and text[high - 1] in " \t\n=:：,;.*，、$(":
        high -= 1
    # "$480 a week" leaves the article behind.
    if text[low:high].endswith(" a"):
        high -= 2
    return (low, high) if low < high else None


def _in_formula(text: str, start: int, end: int, low: int, high: int) -> bool:
    before = text[max(low, start - 1) : start]
    after = text[end : min(high, end + 1)]
    return (before in ("{", "^", "_", "\\", "(", "/") and bool(before)) or (
        after in ("}", "^", "_", "!", "/", "\\") and bool(after)
    )


def last_match(
    pattern: re.Pattern[str], text: str, start: int = 0, end: int | None = None
) -> re.Match[str] | None:
    """Return the last match of a pattern in a stretch of text; None without one."""
    found = deque(pattern.finditer(text, start, len(text) if end is None else end), maxlen=1)
    return found[0] if found else None


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def check_policy(policy: str) -> str:
    """Return `policy` when it names one.

    Args:
        policy: The name.

    Returns:
        The same name.

    Raises:
        ValueError: No policy has that name.
    """
    from . import published

    choices = POLICIES + published.POLICIES
    if policy not in choices:
        near = difflib.get_close_matches(policy, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no policy {policy!r}{hint}; choices: {', '.join(choices)}")
    return policy
