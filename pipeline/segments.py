"""Where the pieces of a completion's text end, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Tokens that a decoder may need before it shows a token as it stands within a text.
CONTEXT = 4


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
