r"""When two texts are the same: the key that duplicates and leaks are found by."""

from __future__ import annotations

import re
import unicodedata

# Spelling of formulas that changes nothing that is asked. Braces, signs and digits stay: they do.
_DRESS = re.compile(
    r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[,;:!> ]|\\q?quad(?![a-zA-Z])"
    r"|\\displaystyle(?![a-zA-Z])|\\[()\[\]]|\$"
)
_SPELLINGS = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\leq": "\\le",
    "\\geq": "\\ge",
    "\\neq": "\\ne",
    "\\cdotp": "\\cdot",
}
_SPELLING = re.compile("|".join(rf"{re.escape(word)}(?![a-zA-Z])" for word in _SPELLINGS))
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-"})
_LOOSE_SPACE = re.compile(r"(?<=\W) | (?=\W)")


def normalise(text: str) -> str:
    r"""Return the form of a text under which two texts count as the same.

    Unicode compatibility forms, letter case, white space, quotation marks and dashes, and the
    dress of formulas (`$`, `\left`, `\dfrac`, thin spaces) do not matter; words, digits, signs
    and brackets do.
    """
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    text = _SPELLING.sub(lambda match: _SPELLINGS[match.group()], text)
    text = _DRESS.sub(" ", text).casefold()
    return _LOOSE_SPACE.sub("", " ".join(text.split()))
