"""Math-Shepherd: solutions whose steps continuations rated, + or -.

Hub id: peiyi9979/Math-Shepherd (`input`, `label`, `task`). The character pair "ки" stands in
`input` after each step; `label` is the same text with + or - in its place.
"""

from __future__ import annotations

from data_prep.errors import UserError
from data_prep.jsonl import Row, column
from data_prep.reading import Drop, Place
from data_prep.schema import LabelledSteps
from data_prep.sources._files import FilesConfig

HUB = "peiyi9979/Math-Shepherd"
SPLITS = {"train": "train"}
MARK = "ки"


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "math_shepherd"


def convert(row: Row, place: Place) -> LabelledSteps:
    """Return the labelled steps of one row.

    Raises:
        UserError: `label` is not `input` with + or - at the marks.
        Drop: No "Step 1:" tells question and solution apart, or nothing is marked.
    """
    where = str(place)
    column(row, "task", str, where)
    pieces = column(row, "input", str, where).split(MARK)
    label = column(row, "label", str, where)
    labels: list[int | None] = []
    position = 0
    for piece in pieces[:-1]:
        position += len(piece)
        sign = label[position : position + 1]
        if sign not in ("+", "-") or label[position - len(piece) : position] != piece:
            raise UserError(
                where,
                f"column 'label' has {label[position : position + 8]!r} at mark {len(labels) + 1}",
                "the text of 'input' with + or - at each mark",
                "mend or remove the row",
            )
        labels.append(1 if sign == "+" else -1)
        position += 1
    if not labels:
        raise Drop("no_steps")
    question, mark, first = pieces[0].partition("Step 1:")
    if not mark:
        raise Drop("question_not_separable")
    steps = [f"{mark}{first}".strip(), *(piece.strip() for piece in pieces[1:-1])]
    return LabelledSteps(
        id=place.id,
        question=question.strip(),
        steps=tuple(steps),
        labels=tuple(labels),
        source=place.source,
        split=place.split,
        where=where,
    )
