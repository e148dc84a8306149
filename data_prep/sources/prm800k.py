"""PRM800K: solutions whose steps people rated +1, 0 or -1.

Files: the original repository's phase1/phase2 JSON lines; hub id tasksource/PRM800K. Of each step
the completion that the labeler went on with is taken; where that was the labeler's own text it
counts as good; a step with neither ends the solution with its first rated completion.
"""

from __future__ import annotations

from typing import Any

from data_prep.jsonl import Row, column
from data_prep.reading import Drop, Place
from data_prep.schema import LabelledSteps
from data_prep.sources._files import FilesConfig

HUB = "tasksource/PRM800K"
SPLITS = {"train": "train", "test": "test"}


class Config(FilesConfig):
    """Files by split; see `data_prep.sources._files.FilesConfig`."""

    kind: str = "prm800k"


def convert(row: Row, place: Place) -> LabelledSteps:
    """Return the labelled steps of one row.

    Raises:
        Drop: The labeler gave the problem up before the first step.
    """
    where = str(place)
    question = column(row, "question", dict, where)
    steps: list[str] = []
    labels: list[int | None] = []
    for step in column(column(row, "label", dict, where), "steps", list, where):
        text, label, goes_on = _chosen(step, where)
        if text is None:
            break
        steps.append(text.strip())
        labels.append(label)
        if not goes_on:
            break
    if not steps:
        raise Drop("no_steps")
    return LabelledSteps(
        id=place.id,
        question=column(question, "problem", str, where).strip(),
        steps=tuple(steps),
        labels=tuple(labels),
        source=place.source,
        split=place.split,
        answer=str(question.get("ground_truth_answer") or ""),
        where=where,
    )


def _chosen(step: dict[str, Any], where: str) -> tuple[str | None, int | None, bool]:
    """Return (text, label, whether the solution goes on) of one step."""
    completions = step.get("completions") or []
    chosen = step.get("chosen_completion")
    if isinstance(chosen, int) and 0 <= chosen < len(completions):
        completion = completions[chosen]
        return column(completion, "text", str, where), completion.get("rating"), True
    human = step.get("human_completion")
    if human:
        return column(human, "text", str, where), 1, True
    for completion in completions:
        if completion.get("rating") is not None:
            return column(completion, "text", str, where), completion["rating"], False
    return None, None, False
