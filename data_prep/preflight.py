"""Checks on the first rows that refuse to go on: a wrong mask trains the wrong thing, silently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from data_prep.errors import UserError
from data_prep.formatting import Formatter, Message, Row

ROWS = 16


def preflight(
    formatter: Formatter, conversations: Sequence[Sequence[Message]], rows: Sequence[Row]
) -> None:
    """Check the first rows of a build against the template and the tokenizer.

    The mask is not empty, covers the end of every assistant turn and nothing of the prompt; there
    is exactly one bos (where the tokenizer has one); the row starts with the very tokens that
    generation is prompted with; the pieces that contents are encoded in give the same tokens and
    mask as the whole conversation, encoded at once as transformers' `apply_chat_template` does.

    Args:
        formatter: What made the rows.
        conversations: Messages of the first rows.
        rows: Their (input ids, mask).

    Raises:
        UserError: A check fails; the message names the row, what was found and what to do.
    """
    for number, (messages, (ids, mask)) in enumerate(zip(conversations, rows, strict=True)):
        failure = _failure(formatter, messages, ids, mask)
        if failure:
            found, fix = failure
            raise UserError(
                f"preflight, row {number}", found, "a row that trains what is meant", fix
            )


def _failure(
    formatter: Formatter, messages: Sequence[Message], ids: list[int], mask: list[int]
) -> tuple[str, str] | None:
    """Return (what is wrong, what to do), or None."""
    tokenizer, layout = formatter.tokenizer, f"the template of layout {formatter.layout!r}"
    if len(ids) != len(mask) or not any(mask):
        return "no token carries loss", f"put generation markers around the assistant in {layout}"
    ends = set(formatter.end_token_ids)
    for turn in _runs(ids, mask):
        if turn[-1] not in ends:
            return (
                f"the loss does not cover the end of a turn: it stops at "
                f"{tokenizer.convert_ids_to_tokens(turn[-1])!r}",
                f"move the end token inside the generation markers of {layout}",
            )
    # When pad shares its id with an end token, masking by id would drop the end of the answer.
    if ids[-1] == tokenizer.pad_token_id and ids[-1] in ends and not mask[-1]:
        return "the last end token is masked like padding", f"mask by position in {layout}"
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in ends and ids.count(bos) != 1:
        return f"{ids.count(bos)} bos tokens, not exactly one", f"write bos once in {layout}"
    before = list(takewhile(lambda message: message["role"] != "assistant", messages))
    prompt = formatter.prompt(before)
    if ids[: len(prompt)] != prompt:
        return (
            "the row does not start with the tokens that generation is prompted with",
            f"make the generation prompt of {layout} the same as the assistant's header",
        )
    if any(mask[: len(prompt)]):
        return "a token of the prompt carries loss", f"move the generation markers of {layout}"
    return _whole(formatter, messages, ids, mask)


def _whole(
    formatter: Formatter, messages: Sequence[Message], ids: list[int], mask: list[int]
) -> tuple[str, str] | None:
    """Compare with the whole conversation's tokens, where contents leave it a fair comparison.

    A content that spells a control token is read as one there; an answer that starts with white
    space may be joined with the header before it, which generation could never produce.
    """
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if formatter.spells_control(messages) or any(text[:1].isspace() for text in answers):
        return None
    text, spans = formatter.rendered(messages)
    whole = formatter.tokenizer(text, add_special_tokens=False)
    if list(whole["input_ids"]) != ids:
        return (
            "the tokens of the pieces differ from those of the whole conversation",
            "this tokenizer joins text across the borders of turns; choose another layout, or "
            "another tokenizer",
        )
    expected = [0] * len(ids)
    for start, stop in spans:
        first, last = whole.char_to_token(start), whole.char_to_token(max(start, stop - 1))
        if stop > start and first is not None and last is not None:
            expected[first : last + 1] = [1] * (last + 1 - first)
    if expected != mask:
        return "the mask differs from the template's own", "report the template with this row"
    return None


def _runs(ids: Sequence[int], mask: Sequence[int]) -> list[list[int]]:
    """Return the stretches of tokens with mask 1."""
    runs: list[list[int]] = []
    previous = 0
    for token, bit in zip(ids, mask, strict=True):
        if bit and not previous:
            runs.append([])
        if bit:
            runs[-1].append(token)
        previous = bit
    return runs
