"""Other ways to write the same answer: for audits and for tests."""

from __future__ import annotations

import re
from collections.abc import Callable

_FRACTION = re.compile(r"\\frac\{(-?\d+)\}\{(\d+)\}")


def _spaced(text: str) -> str:
    return re.sub(r"(?<=[\w)}])\s*([+=])\s*(?=[\w(\\])", r" \1 ", text)


def _grouped(text: str) -> str:
    match = re.fullmatch(r"(-?)(\d{4,})", text)
    return f"{match.group(1)}{int(match.group(2)):,}" if match and text[0] != "0" else text


def _decimal(text: str) -> str:
    return f"{text}.0" if re.fullmatch(r"-?\d+", text) else text


REWRITINGS: dict[str, Callable[[str], str]] = {
    "dollars": lambda t: t if "$" in t else f"${t}$",
    "dfrac": lambda t: t.replace("\\frac", "\\dfrac"),
    "slash": lambda t: _FRACTION.sub(r"\1/\2", t) if _FRACTION.fullmatch(t) else t,
    "spaces": _spaced,
    "left right": lambda t: (
        t.replace("(", "\\left(").replace(")", "\\right)")
        if "\\left" not in t and "\\text" not in t and t.count("(") == t.count(")")
        else t
    ),
    "thousands": _grouped,
    "trailing zero": _decimal,
    "minus sign": lambda t: t.replace("-", "\u2212") if "\\begin" not in t else t,
    "full stop": lambda t: f"{t}." if not t.endswith(".") else t,
    "display style": lambda t: f"\\displaystyle {t}" if "\\" in t else t,
}


def rewritings(text: str) -> dict[str, str]:
    """Return an answer in other notations that mean the same.

    Args:
        text: An answer.

    Returns:
        Texts by the name of the rewriting, without those that change nothing.
    """
    found = {name: change(text) for name, change in REWRITINGS.items()}
    return {name: new for name, new in found.items() if new != text}
