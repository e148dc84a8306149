r"""MetaMathQA: `type`, `query`, `original_question`, `response` that ends "The answer is: …".

Hub id: meta-math/MetaMathQA. GSM rows also have "#### …" on the line before; both lines give way
to a box. Rewrites of one original question share it as their group, so that a split by problem
keeps them together (which is why the -40K variant, without that column, is refused).
"""

from __future__ import annotations

import re

from data_prep.jsonl import Row, column
from data_prep.reading import BadGold, Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, settle

HUB = "meta-math/MetaMathQA"
SPLITS = {"train": "train"}
_ENDING = re.compile(r"(?:\n####[^\n]*)?\s*\bThe answer is:[ \t]*([^\n]*?)\s*$")


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "metamathqa"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row.

    Raises:
        BadGold: The response does not end in "The answer is: …".
        Drop: The response's box contradicts its ending, or the answer cannot be verified.
    """
    where = str(place)
    response = column(row, "response", str, where).strip()
    ending = _ENDING.search(response)
    if ending is None or not ending.group(1):
        raise BadGold(
            where,
            f"no gold: column 'response' ends {response[-40:]!r}",
            "a last line 'The answer is: …'",
            "mend or remove the row",
        )
    gold = ending.group(1).strip("$ ")
    return Problem(
        id=place.id,
        question=column(row, "query", str, where).strip(),
        answer=gold,
        source=place.source,
        split=place.split,
        solutions={"reference": settle(response[: ending.start()].rstrip(), gold)},
        subject=column(row, "type", str, where),
        where=where,
        group=column(row, "original_question", str, where).strip(),
    )
