"""From the text of an answer to its trees: clean it, then try the ways to read it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from . import chinese, glyphs, quick, special
from .nodes import Node, ParseError
from .structure import parse
from .tokens import LexError, tokenize
from .words import GREEK, STATEMENT_WORDS

_LEAD = re.compile(
    r"^(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|result|solution)s?(?:\s+(?:is|are))?\s*[:：=]?\s*(?=\S)",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^((?:\\text\s*\{[^{}]*\}|[A-Za-z][A-Za-z ]*[A-Za-z]{2}))\s*(?:[=:]|\\?=)\s*(?=\S)"
)
_ABOUT = re.compile(
    r"(?:\\q?quad|\\[,;:! ]|\s)*(?:\\text\s*\{)?\s*\((?:\s*\\text\s*\{)?\s*"
    r"(?:about|approx(?:imately|\.)?|≈|\\approx|or about|roughly)"
    r"[^()]*\)\s*\}?\s*$",
    re.IGNORECASE,
)
_TRAILING_DOTS = re.compile(r"(\d\.\d{3,})\s*(?:\.\.\.|\\l?dots|\\cdots)(?=\s*$)")
_SENTENCE = re.compile(
    r"^(?:\\text\s*\{\s*)?((?:the|so|thus|therefore|hence)\b[A-Za-z ,']{0,80}?\b(?:is|are|equals))"
    r"\s*:?\s*\}?\s*(?=\S)",
    re.IGNORECASE,
)
_CAPTION = re.compile(r"^\\text\s*\{([^{}]*?)[:：]\s*\}\s*(?=\S)")
_EUROPEAN = re.compile(r"(-?\d{1,3}(?:\.\d{3})+),(\d+)")
_GROUPED = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,]*\d)")
_SPACED = re.compile(
    r"(?<![\d.,])(\d{1,3}(?:(?: |\\,|\\;|\\ |~|\\!|\{,\}|,\\!\s?|, ?\\!\s?|'){1}\d{3})+)(?!\d)"
)
_COMMA_DECIMAL = re.compile(
    r"([-+]?\s*\d+),(\d+)(\s*(?:\\?[€$%]|\\text\s*\{[^{}]*\}|[A-Za-z]{1,4})?)"
)
_DAMAGED = {
    "\x0crac": "\\frac", "\times": "\\times", "\text": "\\text", "\theta": "\\theta",
    "\tan": "\\tan", "\x08oxed": "\\boxed", "\x08inom": "\\binom", "\x08egin": "\\begin",
    "\right": "\\right", "\rangle": "\\rangle",
}  # fmt: skip
_DOUBLED = re.compile(
    r"\\\\(?=(?:d?frac|sqrt|left|right|text|le\b|ge\b|leq|geq|pi|cup|cap|in\b|infty|times|cdot|begin|end|mathrm|boxed|circ|binom|pm|neq))"
)
_SINGLE_UNIT = re.compile(
    r"([-+]?[\d.,]+)(\s+(?:m|g|s|h|L|l|t)|\s*[gL]|\s*(?:m|cm|km|mm|ft|in)(?:\^\{?[23]\}?)|\s*(?:m|km|cm)/(?:s|h)(?:\^\{?2\}?)?)"
)
_MAX_CHARS = 60000
_END = 200


class Reading(NamedTuple):
    """An answer as it could be read.

    Attributes:
        nodes: Its trees, the likeliest first; empty when it cannot be read.
        normal: Its normal form: the tokens with one blank between.
        squeezed: Its text without blanks and faces, for comparing what cannot be
            read.
        problem: Why it cannot be read; "" when it can.
    """

    nodes: tuple[Node, ...]
    normal: str
    squeezed: str
    problem: str


def read(text: str) -> Reading:
    """Read an answer.

    Args:
        text: An answer as extracted.

    Returns:
        Its trees, or the reason for none.
    """
    if len(text) > _MAX_CHARS:
        return Reading((), text[:200], text, "too long")
    # Only short texts are kept, so that the cache has a bound in bytes too.
    return _read_cached(text) if len(text) <= _CACHED else _read(text)


def _read(text: str) -> Reading:
    clean = tidy_up(text)
    if not clean:
        return Reading((), "", "", "empty")
    try:
        named = special.read(clean)
    except RecursionError:
        named = None
    normal = _normal(clean)
    if named is not None and not (named[0] == "clock" and not named[4]):
        return Reading((named,), normal, normal, "")
    nodes: list[Node] = [] if named is None else [named]
    problem = ""
    for form in _forms(clean):
        try:
            node = parse(form)
        except (ParseError, LexError) as error:
            problem = problem or str(error)
            continue
        except RecursionError:
            problem = problem or "nested too deep"
            continue
        if node not in nodes:
            nodes.append(node)
    if not nodes:
        prose = special.words(clean)
        if prose is not None:
            nodes.append(prose)
    return Reading(tuple(nodes), normal, _squeeze(clean), "" if nodes else problem)


_CACHED = 400
_read_cached = lru_cache(maxsize=16384)(_read)


def tidy_up(text: str) -> str:
    """Clean an answer: delimiters, thousands separators, Unicode, damaged escapes."""
    for broken, whole in _DAMAGED.items():
        if broken in text:
            text = text.replace(broken, whole)
    if "\\\\" in text and "\\begin" not in text:
        text = _DOUBLED.sub(lambda _: "\\", text)
    text = quick.tidy(text)
    text = chinese.rewrite(text)
    text = glyphs.to_latex(text)
    text = _dollars(text)
    text = quick.tidy(text.replace("**", "^") if re.search(r"\w\*\*\w", text) else text.strip("*"))
    text = re.sub(r'"([^"]*)"', r"\1", text)
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = re.sub(r"\\text\s*\{\s*[.,;]?\s*\}", " ", text).strip()
    text = text.removeprefix("=").lstrip() if not text.startswith("==") else text
    text = _TRAILING_DOTS.sub(r"\1", text)
    # Only the end is searched: blanks without number must not cost their square.
    text = text[:-_END] + _ABOUT.sub("", text[-_END:])
    text = _LEAD.sub("", text, count=1) if len(text) > 8 else text
    while text.endswith("}") and text.count("}") > text.count("{"):
        text = text[:-1].rstrip()
    if "\n" in text and "\\begin" not in text:
        text = re.sub(r"\n\s*\n", " ; ", text.strip())
    return quick.tidy(text.rstrip("\\,; \t\r\n"))


def _dollars(text: str) -> str:
    """Drop math delimiters; a lone dollar sign beside a digit is money."""
    if "$" not in text:
        return text
    bare = re.sub(r"\\\$", "", text)
    if bare.count("$") % 2:
        text = re.sub(r"(?<!\\)\$(?=\s*[\d.])", r"\\$", text, count=1)
        if re.sub(r"\\\$", "", text).count("$") % 2:
            text = re.sub(r"(?<=\d)\s?(?<!\\)\$", r"\\$", text, count=1)
    return re.sub(r"(?<!\\)\$", " ", text)


def _forms(clean: str) -> list[str]:
    """The ways to read commas and labels, the likeliest first."""
    base = _SPACED.sub(lambda m: re.sub(r"\D", "", m.group(1)), clean)
    forms: list[str] = []
    if "," in base:
        grouped = _join_thousands(base)
        if grouped != base:
            forms.append(grouped)
        forms.append(base)
        european = _EUROPEAN.fullmatch(base)
        if european is not None:
            forms.append(f"{european.group(1).replace('.', '')}.{european.group(2)}")
        decimal = _COMMA_DECIMAL.fullmatch(base) if grouped == base else None
        if decimal is not None:
            forms.append(f"{decimal.group(1)}.{decimal.group(2)}{decimal.group(3)}")
    else:
        forms.append(base)
    unit = _SINGLE_UNIT.fullmatch(base)
    if unit is not None:
        forms.append(
            unit.group(1).replace(",", "")
            + re.sub(r"([A-Za-z]+)", r"\\text{ \1}", unit.group(2)).replace("/", "\\text{ per }")
        )
    label = _SENTENCE.match(base) or _LABEL.match(base) or _CAPTION.match(base)
    if label is not None and not _states(label.group(1)):
        forms.extend(_join_thousands(form[label.end() :]) for form in (base,))
    return forms


def _states(label: str) -> bool:
    found = {w.lower() for w in re.findall(r"[A-Za-z']+", label)} - {
        "is",
        "are",
        "total",
        "at",
        "the",
    }
    return bool(found & (STATEMENT_WORDS | GREEK))


def _join_thousands(text: str) -> str:
    """Join 1,234,567 outside brackets; inside them a comma separates."""
    out, depth, last = [], 0, 0
    for match in re.finditer(r"\\[{}]|[()\[\]]|" + _GROUPED.pattern, text):
        token = match.group()
        if token in ("(", "[", "\\{"):
            depth += 1
        elif token in (")", "]", "\\}"):
            depth -= 1
        elif match.group(1) and depth == 0:
            out.append(text[last : match.start()] + token.replace(",", ""))
            last = match.end()
    return "".join(out) + text[last:]


def _normal(clean: str) -> str:
    try:
        return " ".join(t.text for t in tokenize(clean[:2000]))
    except (LexError, RecursionError):
        return " ".join(clean.split())[:2000]


def _squeeze(clean: str) -> str:
    text = re.sub(r"\\(?:q?quad|[,;: ])", " ", clean)
    text = re.sub(
        r"\\(?:left|right|displaystyle|text|mathrm|mbox|textbf|mathbf|operatorname|big|Big|!)",
        "",
        text,
    )
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    # A blank between two digits or letters, and every brace, carries meaning.
    return re.sub(r"[\s~]+(?!\w)|(?<!\w)[\s~]+|\$|\.$", "", text)
