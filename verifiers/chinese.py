"""Chinese numerals and fractions in words, rewritten in digits."""

from __future__ import annotations

import re

_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_SMALL = {"十": 10, "百": 100, "千": 1000}
_LARGE = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_NUMERAL = "[负]?[零〇一二两三四五六七八九十百千万萬亿億]+(?:点[零〇一二三四五六七八九]+)?"
_FRACTION = re.compile(f"({_NUMERAL}|\\d+)分之({_NUMERAL}|\\d+(?:\\.\\d+)?)")
_MIXED = re.compile(f"({_NUMERAL}|\\d+)又({_NUMERAL}|\\d+)分之({_NUMERAL}|\\d+)")
_WHOLE = re.compile(f"(约|大约)?({_NUMERAL})(?=$|[^零一二三四五六七八九十百千万亿点])")
_LEAD = re.compile(r"^(?:答案(?:是|为)?|答|等于|得|结果(?:是|为)|是|为|共|一共|大约|约)[:：]?\s*")


def number(text: str) -> str | None:
    """Return a Chinese numeral in digits; None when it is none.

    Args:
        text: For example 三百零五 or 二点五.
    """
    if not text or not re.fullmatch(_NUMERAL, text):
        return text if re.fullmatch(r"\d+(?:\.\d+)?", text or "") else None
    sign = "-" if text[0] == "负" else ""
    whole, _, places = text.lstrip("负").partition("点")
    value = _whole(whole)
    if value is None:
        return None
    decimals = "." + "".join(str(_DIGITS[c]) for c in places) if places else ""
    return f"{sign}{value}{decimals}"


def _whole(text: str) -> int | None:
    if text and all(c in _DIGITS for c in text):
        return int("".join(str(_DIGITS[c]) for c in text))  # 二〇二四
    total = section = digit = 0
    for char in text:
        if char in _DIGITS:
            digit = _DIGITS[char]
        elif char in _SMALL:
            section += (digit or 1) * _SMALL[char]
            digit = 0
        else:
            total = (
                (total + section + digit) * _LARGE[char]
                if _LARGE[char] == 10**8
                else (total + (section + digit) * _LARGE[char])
            )
            section = digit = 0
    return total + section + digit


def rewrite(text: str) -> str:
    """Rewrite numerals in an answer.

    Fractions in words are rewritten anywhere, a plain numeral only when the answer
    starts with it, so that 三角形 stays a word.

    Args:
        text: An answer.

    Returns:
        The answer with digits; without Chinese characters it comes back as it is.
    """
    if text.isascii():
        return text
    text = _LEAD.sub("", text, count=1)
    text = _MIXED.sub(_mixed, text)
    text = _FRACTION.sub(_fraction, text)
    match = _WHOLE.match(text)
    if match is not None:
        value = number(match.group(2))
        rest = text[match.end() :]
        if value is not None and (not rest or len(rest) <= 3):
            return value + rest
    return text


def _fraction(match: re.Match[str]) -> str:
    if match.group(1) == "百":
        top = number(match.group(2))
        return match.group() if top is None else f"{top}\\%"
    bottom, top = number(match.group(1)), number(match.group(2))
    if top is None or bottom is None:
        return match.group()
    return f"\\frac{{{top}}}{{{bottom}}}"


def _mixed(match: re.Match[str]) -> str:
    parts = [number(part) for part in match.groups()]
    if None in parts:
        return match.group()
    return f"{parts[0]}\\frac{{{parts[2]}}}{{{parts[1]}}}"
