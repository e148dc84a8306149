"""HH-RLHF: two whole conversations, `chosen` and `rejected`, that part at the last answer.

Hub id: Anthropic/hh-rlhf (data_dir harmless-base, helpful-base, …). Turns start with a blank
line and "Human: " or "Assistant: "; the prompt is all that both share up to the last "Assistant:".
"""

from __future__ import annotations

import re

from data_prep.errors import UserError
from data_prep.jsonl import Row, column
from data_prep.reading import Drop, Place
from data_prep.schema import Preference
from data_prep.sources._files import FilesConfig

HUB = "Anthropic/hh-rlhf"
SPLITS = {"train": "train", "test": "test"}
_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "hh_rlhf"


def convert(row: Row, place: Place) -> Preference:
    """Return the pair of one row.

    Raises:
        UserError: A text does not start with a turn.
        Drop: The two do not share a prompt, or do not differ, or one answer is empty.
    """
    where = str(place)
    chosen = _turns(column(row, "chosen", str, where), "chosen", where)
    rejected = _turns(column(row, "rejected", str, where), "rejected", where)
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        raise Drop("prompts_differ")
    if chosen[-1][0] != "assistant" or rejected[-1][0] != "assistant" or not prompt:
        raise Drop("no_answer")
    if not chosen[-1][1] or not rejected[-1][1]:
        raise Drop("empty_answer")
    if chosen[-1] == rejected[-1]:
        raise Drop("same_answer")
    return Preference(
        id=place.id,
        prompt=tuple(prompt),
        chosen=chosen[-1][1],
        rejected=rejected[-1][1],
        source=place.source,
        split=place.split,
        where=where,
    )


def _turns(text: str, name: str, where: str) -> list[tuple[str, str]]:
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise UserError(
            where,
            f"column {name!r} starts {text[:40]!r}",
            "a blank line and 'Human: '",
            "mend or remove the row",
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        (_ROLES[mark.group(1)], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
