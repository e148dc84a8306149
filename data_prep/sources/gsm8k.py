r"""GSM8K's published files: `question`, and `answer` that ends in "#### <number>".

Hub id: openai/gsm8k. The calculator annotations `<<48/2=24>>` are removed, the gold loses its
thousands separators, and the solution ends in a box instead of after "####".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from data_prep.jsonl import Row, column
from data_prep.reading import BadGold, Place, items, strictly
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, boxed

HUB = "openai/gsm8k/main"
SPLITS = {"train": "train", "test": "test"}
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_GOLD = re.compile(r"^####[ \t]*(.*?)[ \t]*$", re.MULTILINE)


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "gsm8k"


def read(config: Config, seed: int) -> Iterator[Problem]:
    """Return the problems in the order of the files; `seed` has no say.

    Raises:
        UserError: A row lacks a column or its "#### <number>".
    """
    return cast(Iterator[Problem], strictly(items(config)))


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row."""
    where = str(place)
    question = column(row, "question", str, where).strip()
    gold, solution = split_answer(column(row, "answer", str, where), where)
    return Problem(
        id=place.id,
        question=question,
        answer=gold,
        source=place.source,
        split=place.split,
        solutions={"reference": f"{solution}\n{boxed(gold)}".lstrip()},
        where=where,
    )


def split_answer(answer: str, where: str) -> tuple[str, str]:
    """Return (gold, solution) of GSM8K's `answer` column.

    Raises:
        BadGold: Nothing stands after "####", or there is no "####".
    """
    marks = list(_GOLD.finditer(answer))
    if not marks or not marks[-1].group(1):
        raise BadGold(
            where,
            f"no gold in column 'answer', which ends {answer[-40:]!r}",
            "a last line '#### <number>'",
            'mend or remove the row, or set data.on_bad_gold = "skip"',
        )
    gold = marks[-1].group(1).replace(",", "").removeprefix("$")
    return gold, _ANNOTATION.sub("", answer[: marks[-1].start()]).rstrip()
