r"""Orca-Math word problems: `question`, and `answer` in free text without a gold of its own.

Hub id: microsoft/orca-math-word-problems-200k. The last number of an answer is not always its
result, so the final answer is taken only where the text leaves no choice: its own box, an "answer
is …", or a last sentence with one number that the question did not give. All else is dropped,
counted as "no_final_answer".
"""

from __future__ import annotations

import re

from data_prep.jsonl import Row, column
from data_prep.reading import Drop, Place
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, final_answer, settle

HUB = "microsoft/orca-math-word-problems-200k"
SPLITS = {"train": "train"}
# Not part of a word or an ordinal ("5th"), with thousands separators, decimals or a fraction.
_NUMBER = re.compile(r"(?<![\w.,/])-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?![\w/]|\.\d|,\d)")
_STATED = re.compile(
    r"\banswer(?: to [^.\n]{1,60})? is:?\s*\$?\s*(-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?)(?![\w/])",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\\$*])|\n+")


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "orca_math"


def convert(row: Row, place: Place) -> Problem:
    """Return the problem of one row.

    Raises:
        Drop: The text leaves open what its final answer is, or it cannot be verified.
    """
    where = str(place)
    question = column(row, "question", str, where).strip()
    answer = column(row, "answer", str, where).strip()
    gold = find_answer(question, answer)
    if gold is None:
        raise Drop("no_final_answer")
    return Problem(
        id=place.id,
        question=question,
        answer=gold,
        source=place.source,
        split=place.split,
        solutions={"reference": settle(answer, gold)},
        where=where,
    )


def find_answer(question: str, answer: str) -> str | None:
    """Return the final answer of a free text; None where the text leaves it open."""
    own = final_answer(answer)
    if own is not None:
        return own
    stated = _STATED.findall(answer)
    if stated:
        return stated[-1].replace(",", "")
    sentences = [part for part in _SENTENCE.split(answer) if part.strip()]
    numbers = list(dict.fromkeys(_NUMBER.findall(sentences[-1]))) if sentences else []
    given = set(_NUMBER.findall(question))
    new = [number for number in numbers if number not in given]
    chosen = new if len(new) == 1 else numbers
    return chosen[0].replace(",", "") if len(chosen) == 1 else None
