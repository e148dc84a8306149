r"""GSM8K's published files: `question`, and `answer` that ends in "#### <number>".

Hub id: openai/gsm8k. The calculator annotations `<<48/2=24>>` are removed, the gold loses its
thousands separators, and the solution ends in a box instead of after "####".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_prep.errors import UserError
from data_prep.jsonl import column
from data_prep.schema import Problem
from data_prep.sources._files import FilesConfig, boxed, rows

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_GOLD = re.compile(r"^####[ \t]*(.*?)[ \t]*$", re.MULTILINE)


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "gsm8k"


def read(config: Config, seed: int) -> Iterator[Problem]:
    """Yield the problems in the order of the files; `seed` has no say.

    Raises:
        UserError: A row lacks a column or its "#### <number>".
    """
    for split, where, index, row in rows(config):
        question = column(row, "question", str, where).strip()
        answer = column(row, "answer", str, where)
        gold, solution = split_answer(answer, where)
        yield Problem(
            id=f"gsm8k-{split}-{index:05d}", question=question, answer=gold, source="gsm8k",
            split=split, solutions={"reference": f"{solution}\n{boxed(gold)}".lstrip()},
            where=where,
        )


def split_answer(answer: str, where: str) -> tuple[str, str]:
    """Return (gold, solution) of GSM8K's `answer` column.

    Raises:
        UserError: Nothing stands after "####", or there is no "####".
    """
    marks = list(_GOLD.finditer(answer))
    if not marks or not marks[-1].group(1):
        raise UserError(
            where, f"no gold in column 'answer', which ends {answer[-40:]!r}",
            "a last line '#### <number>'", "mend or remove the row",
        )
    gold = marks[-1].group(1).replace(",", "").removeprefix("$")
    return gold, _ANNOTATION.sub("", answer[: marks[-1].start()]).rstrip()
