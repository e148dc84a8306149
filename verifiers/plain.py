"""Untrusted text as a terminal may show it."""

from __future__ import annotations

import re

# Control characters but tab and line feed (an escape sequence can retitle the window, hide lines or
# answer in the user's name; a carriage return overwrites what stands before it), what separates
# lines elsewhere, what turns the direction of writing, and halves of surrogate pairs.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: object) -> str:
    r"""Return a text whose control characters are spelt as JSON does (`\u001b`).

    Line feeds and tabs stay, a text without control characters comes back as it is, and JSON
    stays the same JSON.
    """
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", str(text))
