r"""Encodes plain ASCII texts word by word, each word once: several times faster than from anew.

A byte-level BPE tokenizer cuts a text into words by a pattern and encodes each word by itself, so
a table of words gives the same tokens. On ASCII the pattern's Unicode classes have simple
equivalents (`\p{L}` is A-Za-z, `\p{N}` is 0-9), which Python's `re` runs fast. Whatever is not of
this kind (another sort of tokenizer, other characters) is left to the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

# Words beyond this many are encoded each time they come: rare ones, by Zipf's law.
MOST_WORDS = 400_000
_CLASSES = {"\\p{L}": "A-Za-z", "\\p{N}": "0-9"}


class WordEncoder:
    """Encodes ASCII texts with the tokens of one tokenizer; see `word_encoder`."""

    def __init__(self, tokenizer: Tokenizer, pattern: re.Pattern[str], others: list[str]) -> None:
        """Start with an empty table.

        Args:
            tokenizer: A byte-level BPE tokenizer.
            pattern: Its word pattern, for ASCII.
            others: Added tokens that it finds in plain text; texts with one are not encoded here.
        """
        self._words = pattern.findall
        self._others = others
        self._table = _Table(tokenizer.model)

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of a text; None where the tokenizer itself has to encode it."""
        if not text.isascii() or any(other in text for other in self._others):
            return None
        return list(chain.from_iterable(map(self._table.__getitem__, self._words(text))))


class _Table(dict[str, list[int]]):
    """Tokens by word, encoded when first asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> list[int]:
        spelled = self._bytes.pre_tokenize_str(word)[0][0]
        ids = [token.id for token in self._model.tokenize(spelled)]
        if len(self) < MOST_WORDS:
            self[word] = ids
        return ids


def word_encoder(tokenizer: Tokenizer) -> WordEncoder | None:
    """Return the word encoder of a tokenizer; None where it is not of the kind described above.

    Args:
        tokenizer: Set to read special tokens as plain text.
    """
    table = json.loads(tokenizer.to_str())
    steps = (table["pre_tokenizer"] or {}).get("pretokenizers", [])
    model = table["model"]
    # NFC changes nothing in ASCII.
    is_plain = (table["normalizer"] or {"type": "NFC"}) == {"type": "NFC"}
    if (
        not is_plain
        or model["type"] != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or [step["type"] for step in steps] != ["Split", "ByteLevel"]
    ):
        return None
    split, spelling = steps
    if (
        "Regex" not in split["pattern"]
        or split["behavior"] != "Isolated"
        or split["invert"]
        or spelling["add_prefix_space"]
        or spelling["use_regex"]
    ):
        return None
    pattern = _for_ascii(split["pattern"]["Regex"])
    if pattern is None:
        return None
    others = [token["content"] for token in table["added_tokens"] if not token["special"]]
    return WordEncoder(tokenizer, pattern, others)


def _for_ascii(pattern: str) -> re.Pattern[str] | None:
    r"""Return a word pattern for ASCII texts; None where it says more than letters and numbers."""
    parts: list[str] = []
    inside = False
    for piece in re.findall(r"\\p\{[LN]\}|\\.|[\[\]]|[^\\\[\]]+", pattern, re.DOTALL):
        if piece in _CLASSES:
            parts.append(_CLASSES[piece] if inside else f"[{_CLASSES[piece]}]")
            continue
        inside = {"[": True, "]": False}.get(piece, inside)
        parts.append(piece)
    try:
        compiled = re.compile("".join(parts), re.ASCII)
    except re.error:
        return None
    # A group would change what `findall` returns; another property was not translated.
    return None if compiled.groups or "\\p" in compiled.pattern else compiled
