"""UltraChat: conversations of several turns, without gold answers.

Hub ids: HuggingFaceH4/ultrachat_200k (splits train_sft and test_sft; `prompt`, `prompt_id`,
`messages`) and openbmb/UltraChat (`id`, `data`: texts, the user's first). The column `prompt`
repeats the first turn and is left alone. A last turn of the user, which nobody answers, is cut
off.
"""

from __future__ import annotations

from typing import Any

from data_prep.errors import UserError
from data_prep.jsonl import Row, column
from data_prep.reading import Drop, Place
from data_prep.schema import Chat
from data_prep.sources._files import FilesConfig

HUB = "HuggingFaceH4/ultrachat_200k"
SPLITS = {"train": "train_sft", "test": "test_sft"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "ultrachat"


def convert(row: Row, place: Place) -> Chat:
    """Return the conversation of one row.

    Raises:
        UserError: A turn is not text, or the roles do not take turns.
        Drop: Nothing is left to learn: no assistant turn, or an empty one.
    """
    where = str(place)
    if "data" in row and "messages" not in row:
        texts = column(row, "data", list, where)
        turns = [("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    else:
        turns = [_turn(turn, where) for turn in column(row, "messages", list, where)]
    _check_turns(turns, where)
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise Drop("no_assistant_turn")
    if not all(text.strip() for role, text in turns if role != "system"):
        raise Drop("empty_turn")
    messages = tuple((role, text.strip()) for role, text in turns)
    return Chat(id=place.id, messages=messages, source=place.source, split=place.split, where=where)


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise UserError(
            where,
            f"a turn is {type(turn).__name__}",
            "an object with role and content",
            "mend the row",
        )
    return column(turn, "role", str, where), column(turn, "content", str, where)


def _check_turns(turns: list[tuple[str, Any]], where: str) -> None:
    expected = "user"
    for number, (role, text) in enumerate(turns):
        if not isinstance(text, str):
            raise UserError(
                where, f"turn {number + 1} is {type(text).__name__}", "text", "mend the row"
            )
        if role == "system" and number == 0:
            continue
        if role != expected:
            raise UserError(
                where,
                f"turn {number + 1} is {role!r}",
                repr(expected),
                "user and assistant take turns; mend the row",
            )
        expected = "assistant" if role == "user" else "user"
